"""The chatbot's commands: python -m chatbot {serve,check,guardrails,password,preferences}."""

from __future__ import annotations

import argparse
import getpass
import json
import logging
import os
import socket
import sys
from pathlib import Path

from chatbot import config as configs
from chatbot.errors import UserError


def serve(args: argparse.Namespace) -> int:
    """Serve page and API until SIGTERM; running answers are finished first."""
    config = configs.load(args.config)
    import uvicorn

    from chatbot.app import make_app
    app = make_app(config)
    server = config.server
    logging.info("listening on http://%s:%d", server.host, server.port)

    class Server(uvicorn.Server):
        """Ends when the last answer has: open pages hold a connection for ever, so waiting for connections would wait in vain."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for listening in self.servers:
                listening.close()
            await app.conversation.service.drain(server.shutdown_seconds)
            self.config.timeout_graceful_shutdown = 2  # for the last bytes on their way
            await super().shutdown(sockets)

    running = Server(uvicorn.Config(
        app, host=server.host, port=server.port, root_path=server.root_path, log_config=None, access_log=False, lifespan="on",
        proxy_headers=False, server_header=False, timeout_keep_alive=30, h11_max_incomplete_event_size=65536))
    running.run()
    return 0 if running.started else 1


def check(args: argparse.Namespace) -> int:
    """Read the configuration as `serve` does, and say what would be served."""
    config = configs.load(args.config)
    from chatbot.errors import NotReadyError
    from chatbot.guardrails.registry import describe
    from chatbot.serving.runs import resolve
    checks = describe(config.guardrails)
    if config.access.mode == "users":
        from chatbot.access.sessions import Sessions
        from chatbot.access.users import Users
        Users(Path(config.access.users_file))
        Sessions(config.access.session_key_file, config.access.session_hours)
    try:
        run = resolve(config.storage_path, config.serve)
        served = {"run": run.id, "checkpoint_sha256": run.digest}
    except NotReadyError as error:
        served = {"waiting": str(error)}
    print(json.dumps({"serve": served, "engine": config.engine.kind, "access": config.access.mode,
                      "guardrails": [c["check"] for c in checks]}, indent=1))
    return 0


def password(_: argparse.Namespace) -> int:
    """Print a line `name:hash` for the users' file; the password is read without echo, or from a pipe."""
    from chatbot.access.users import hash_password
    interactive = sys.stdin.isatty()
    name = input("Name: ") if interactive else sys.stdin.readline().rstrip("\n")
    word = getpass.getpass("Password: ") if interactive else sys.stdin.readline().rstrip("\n")
    if not name or ":" in name or len(word) < 8:
        raise UserError("Give a name without ':' and a password of at least 8 characters.")
    print(f"{name}:{hash_password(word)}")
    return 0


def preferences(args: argparse.Namespace) -> int:
    """Print the feedback as preference data, one JSON object a line."""
    from chatbot.records.keeper import preferences as rows
    for row in rows(Path(args.directory)):
        print(json.dumps(row, ensure_ascii=False))
    return 0


def guardrails(args: argparse.Namespace) -> int:
    """Run the test tables; print recall and false-positive rate of each check."""
    from chatbot.guardrails.tables import report
    config = configs.load(args.config).guardrails if args.config else configs.GuardrailsConfig()
    return report(config, [Path(p) for p in args.fine])


def main(argv: list[str] | None = None) -> int:
    """Run a command. Errors that a user can mend are printed as one line."""
    parser = argparse.ArgumentParser(prog="python -m chatbot", description="Serves a fine-tuned model.")
    commands = parser.add_subparsers(dest="command", required=True)
    default = os.environ.get("CHATBOT_CONFIG")
    for command in (serve, check):
        part = commands.add_parser(command.__name__, help=(command.__doc__ or "").splitlines()[0])
        part.add_argument("--config", default=default, required=default is None, help="YAML file (default: CHATBOT_CONFIG)")
        part.set_defaults(run=command)
    part = commands.add_parser("guardrails", help=guardrails.__doc__)
    part.add_argument("--config", default=None, help="YAML file whose guardrails are tested (default: the built-in ones)")
    part.add_argument("--fine", action="append", default=[],
                      help="file with questions that must pass (.jsonl with `question`, PubMedQA .json, .txt)")
    part.set_defaults(run=guardrails)
    part = commands.add_parser("password", help=password.__doc__)
    part.set_defaults(run=password)
    part = commands.add_parser("preferences", help=preferences.__doc__)
    part.add_argument("directory", help="records.directory of the configuration")
    part.set_defaults(run=preferences)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return int(args.run(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
