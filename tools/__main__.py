"""Command line of the operator's tools; `make help` lists the same."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys

from tools.cluster.settings import Settings
from tools.errors import OperatorError
from tools.layout import Layout

PARTS = ("argocd", "environments", "local_run", "results", "promote", "rollback", "diff", "remove", "site.check", "bundle", "cluster.site")
"""Modules of this package that add a command with `add_parser(commands)`."""


def _up(arguments: argparse.Namespace) -> int:
    from tools.cluster.up import up
    up(Layout(), Settings())
    return 0


def _down(arguments: argparse.Namespace) -> int:
    from tools.cluster.down import down
    print("The local cluster is down; caches and runs are kept." if down(Layout(), Settings()) else "The local cluster is not up.")
    return 0


def _clean(arguments: argparse.Namespace) -> int:
    _down(arguments)
    layout = Layout()
    if layout.cache.exists():
        runs = layout.storage / "runs"
        kept = len(list(runs.iterdir())) if runs.exists() else 0
        print(f"Removing {layout.cache}, with the {kept} runs on the local storage.")
        shutil.rmtree(layout.cache)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from tools.cluster import kubernetes, status
    layout = Layout()
    print(status.text(kubernetes.api_client(layout), layout, Settings()))
    return 0


def _images(arguments: argparse.Namespace) -> int:
    from tools import images
    from tools.cluster import debian
    layout = Layout()
    debian.unpack(layout, print)
    (layout.runtime / "buildah").mkdir(parents=True, exist_ok=True)
    if arguments.registry:
        print(f"Digests: {images.publish(layout, arguments.registry, arguments.tag, print)}")
        return 0
    builder = images.Builder(layout)
    for image in images.with_bases(images.PUBLISHED):
        print(f"{image.name}: {'built' if builder.build(image, images.labelled(image.name, print)) else 'up to date'}")
    return 0


def _charts(arguments: argparse.Namespace) -> int:
    import yaml

    from tools import charts
    from tools.cluster import sources
    layout, settings = Layout(), Settings()
    charts.copy_crds(sources.module_directory(layout, "kuberay", charts.KUBERAY_MODULE))
    for source in sources.sources(settings):
        if source.name == "helm":
            sources.build(source, layout, print)
    archive = charts.package(yaml.safe_load((charts.CHART / "Chart.yaml").read_text())["version"], layout.cache / "charts")
    print(archive)
    if arguments.registry:
        print(charts.push(arguments.registry, archive))
    return 0


def _ask(arguments: argparse.Namespace) -> int:
    import httpx
    settings = Settings()
    url = arguments.url or f"http://127.0.0.1:{settings.chatbot_port}"
    try:
        answer = httpx.post(f"{url}/ask", json={"question": arguments.question}, timeout=300)
    except httpx.HTTPError as error:
        raise OperatorError(f"The chatbot at {url} does not answer ({error}). See `make status`.") from None
    if answer.status_code != 200:
        raise OperatorError(f"The chatbot at {url} answered {answer.status_code}: {answer.text[:500]}")
    print(answer.json()["answer"] if not arguments.json else json.dumps(answer.json(), indent=1))
    return 0


def main() -> int:
    """Parse the arguments and run one command. Errors that an operator can act on are printed without a traceback."""
    parser = argparse.ArgumentParser(prog="python -m tools", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (("up", _up, "bring the local cluster up and fine-tune"), ("down", _down, "take the local cluster away"),
                            ("clean", _clean, "down, and remove caches and runs"), ("status", _status, "show everything on one screen")):
        commands.add_parser(name, help=text).set_defaults(run=run)
    command = commands.add_parser("images", help="build the images; with --registry, push them and write their digests")
    command.add_argument("--registry", default="")
    command.add_argument("--tag", default="")
    command.set_defaults(run=_images)
    command = commands.add_parser("charts", help="package the chart; with --registry, push it")
    command.add_argument("--registry", default="")
    command.set_defaults(run=_charts)
    command = commands.add_parser("ask", help="ask the running chatbot")
    command.add_argument("question")
    command.add_argument("--url", default="")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_ask)
    for name in PARTS:
        importlib.import_module(f"tools.{name}").add_parser(commands)
    arguments = parser.parse_args()
    try:
        code = int(arguments.run(arguments) or 0)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output has seen enough (`make results | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OperatorError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
        return 130


sys.exit(main())
