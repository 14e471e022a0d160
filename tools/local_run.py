"""`make try`: the local environment's run on this machine, without Kubernetes and without root; then the chatbot's page.

The same code and configuration as in the cluster: the run of environments/local, Ray started by the trainer itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tools import runid
from tools.cluster import model, preflight
from tools.cluster.settings import Settings
from tools.errors import OperatorError
from tools.layout import REPOSITORY, Layout

ENVIRONMENT = REPOSITORY / "environments/local"


def configuration(layout: Layout) -> dict[str, Any]:
    """The trainer's configuration file: the environment's run and resources, on the local storage.

    The checkout stands in for the image in the run's hash, so that a run by hand is never taken for one of the cluster's.
    """
    job = runid.read_values(ENVIRONMENT / "finetune.yaml")["finetune-job"]
    return {"run": job["run"], "resources": job["resources"], "storage": str(layout.storage), "id": runid.run_id("checkout", job["run"])}


def try_run(layout: Layout, settings: Settings, serve: bool) -> int:
    """Prepare, train, export, evaluate, report; then serve the model until Ctrl-C."""
    if serve and not preflight.free("127.0.0.1", settings.chatbot_port):
        raise OperatorError(f"Port {settings.chatbot_port} is taken; stop what listens there (is the local cluster up? `make down`).")
    print("base model", flush=True)
    model.place(layout, layout.storage, lambda text: print(f"  {text}", flush=True))
    config = configuration(layout)
    files = layout.cache / "try"
    files.mkdir(parents=True, exist_ok=True)
    (files / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    python = {name: layout.cache / "venv" / name / "bin/python" for name in ("trainer", "chatbot")}
    done = subprocess.run([python["trainer"], "-m", "trainer", "run", "--config", files / "run.yaml"], env=environment, cwd=files,
                          check=False)
    if done.returncode != 0:
        return done.returncode
    run = layout.storage / "runs" / config["id"]
    print(f"\nReport: {run}/report.html")
    if not serve:
        return 0
    (files / "chatbot.yaml").write_text(yaml.safe_dump(_chatbot(layout, settings, config["id"], files), sort_keys=False))
    print(f"Chatbot: http://localhost:{settings.chatbot_port} (Ctrl-C ends it)", flush=True)
    return subprocess.run([python["chatbot"], "-m", "chatbot", "serve", "--config", files / "chatbot.yaml"], env=environment, cwd=files,
                          check=False).returncode


def _chatbot(layout: Layout, settings: Settings, run: str, files: Path) -> dict[str, Any]:
    return {"storage": str(layout.storage), "serve": {"run": run, "base": True},
            "server": {"host": "127.0.0.1", "port": settings.chatbot_port}, "records": {"directory": str(files / "records")}}


def add_parser(commands: Any) -> None:
    """`try`."""
    parser: argparse.ArgumentParser = commands.add_parser("try", help="fine-tune on this machine without Kubernetes, then serve the model")
    parser.add_argument("--no-chatbot", action="store_true", help="end after the report")
    parser.set_defaults(run=lambda arguments: try_run(Layout(), Settings(), serve=not arguments.no_chatbot))
