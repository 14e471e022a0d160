"""`python -m trainer.sitecheck COMMAND`: one measurement, printed as one line of JSON (see the package's docstring)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from trainer.errors import UserError


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    """The run's plan; with --network-gbps, on the network that was measured."""
    from trainer import config as configuration
    from trainer.plan import planner

    config = configuration.load("env:LLM_FINETUNE_CONFIG")
    if options.network_gbps:
        groups = [dataclasses.replace(g, network_gbps=0.0) for g in config.resources.groups]
        config = dataclasses.replace(config, resources=dataclasses.replace(config.resources, network_gbps=options.network_gbps,
                                                                           groups=groups))
    found = planner.plan(config, advise=False)
    return {**found.to_dict(), "workers_gpus": found.workers * config.resources.gpus_per_worker,
            "workers_cpus": found.workers * config.resources.cpus_per_worker, "every_minutes": config.run.checkpoint.every_minutes}


def _run(options: argparse.Namespace) -> dict[str, Any]:
    from trainer.sitecheck import collective, machine, network, storage

    directory = Path(options.directory or ".")
    match options.command:
        case "facts":
            return machine.facts()
        case "cuda":
            return machine.cuda()
        case "write":
            return storage.write(directory, options.name, options.megabytes)
        case "read":
            return storage.read(directory, options.name)
        case "fsync":
            return {**storage.fsyncs(directory), **storage.space(directory)}
        case "renames" | "watches" | "holds" | "tries" | "remove":
            return dict(getattr(storage, options.command)(directory))
        case "races":
            return storage.races(directory, options.name)
        case "tcp":
            return network.measure(options.host, options.port or network.PORT, options.seconds)
        case "all-reduce":
            return collective.all_reduce(options.first, options.local, options.world, options.host, options.port or collective.PORT,
                                         options.gpu, options.megabytes)
        case _:
            return _plan(options)


def main(argv: list[str] | None = None) -> int:
    """Run a command. Prints {"error": ...} and returns 1 if it cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m trainer.sitecheck", description=__doc__)
    parser.add_argument("command", choices=["serve", "facts", "cuda", "write", "read", "fsync", "renames", "watches", "holds", "tries",
                                            "races", "remove", "tcp", "all-reduce", "plan"])
    parser.add_argument("--directory", help="directory on the shared storage")
    parser.add_argument("--name", default="file", help="file, or side of a race (a, b)")
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--host", default="", help="the other pod")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--first", type=int, default=0, help="first rank of this pod")
    parser.add_argument("--local", type=int, default=1, help="ranks of this pod")
    parser.add_argument("--world", type=int, default=1, help="ranks of all pods")
    parser.add_argument("--gpu", action="store_true", help="NCCL, one rank a GPU")
    parser.add_argument("--network-gbps", type=float, default=0.0, help="plan with this bandwidth between nodes")
    options = parser.parse_args(argv)
    if options.command == "serve":
        from trainer.sitecheck.network import PORT, Server

        Server(port=options.port or PORT)
        print("ready", flush=True)
        time.sleep(options.seconds)
        return 0
    try:
        found = _run(options)
    except (OSError, RuntimeError, UserError) as error:
        found = {"error": f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error)}
    print(json.dumps(found), flush=True)
    # Threads of CUDA and NCCL that hang must not keep the answer back.
    sys.stdout.flush()
    os._exit(1 if "error" in found and options.command not in ("facts", "cuda") else 0)


if __name__ == "__main__":
    sys.exit(main())
