"""`python -m trainer COMMAND --config FILE|env:NAME`: see `--help`.

Exit codes: 0 done; 2 the user has something to mend (one message says what); 1 anything else, worth another try.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from typing import Any

from trainer import config as configuration
from trainer.config import Config
from trainer.errors import UserError

COMMANDS = {
    "run": "all stages, on Ray: prepare, train, export, evaluate, report",
    "plan": "memory, network and speed of the run, computed without a GPU",
    "prepare": "the dataset: tokenised rows and held-out rows",
    "train": "training, from the newest checkpoint",
    "export": "the model directory, from a checkpoint",
    "evaluate": "base model against the exported one",
    "report": "report.json, report.md, report.html",
    "schema": "JSON schema of `run` and `resources`",
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Fine-tunes a Llama model; one configuration file is one run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name != "schema":
            command.add_argument("--config", required=True, metavar="FILE|env:NAME",
                                 help="YAML file, or an environment variable that holds it")
            command.add_argument("--storage", metavar="DIR", help="shared storage (default: the file's `storage`)")
            command.add_argument("--id", metavar="ID", help="name of the run directory (default: the file's `id`, else run.name)")
    return parser.parse_args(argv)


def summary(report: dict[str, Any]) -> str:
    """The report's figures as one JSON line."""
    return json.dumps({key: report.get(key) for key in ("run", "state", "base", "tuned", "train", "gate")}, ensure_ascii=False)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(message)s")
    try:
        if options.command == "schema":
            from trainer import schema

            print(schema.text(), end="")
            return 0
        config = configuration.load(options.config, storage=options.storage, id=options.id)
        if options.command == "plan":
            return plan(config)
        from trainer import launch

        if options.command == "run":
            print(summary(launch.run(config)))
        else:
            launch.single(config, options.command)
        return 0
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from the last checkpoint.", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        if not hasattr(error, "worker_failures"):
            raise
        from trainer import failures

        print(f"Error: training failed and was given up: {failures.reason(error, config)}", file=sys.stderr, flush=True)
        return 1


def plan(config: Config) -> int:
    """Print the plan; 1 if the run does not fit its GPUs."""
    from trainer import plan as planning

    found = planning.plan(config)
    print(planning.render(found), end="")
    return int(found.fits is False)


if __name__ == "__main__":
    sys.exit(main())
