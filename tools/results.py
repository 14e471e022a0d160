"""`make results`: the figures of a run's report as one JSON object on stdout.

Read from the storage directory of the local environment (or `--storage DIR`), or, with `--namespace`, through a running pod of an
environment that has the shared storage mounted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tools.errors import OperatorError
from tools.layout import Layout

KEYS = ("run", "state", "base_model", "dataset", "method", "verdict", "base", "tuned", "difference", "train", "contamination", "gate",
        "checkpoint_sha256", "samples")
"""Parts of report.json that are printed, in this order; plots and tables of nodes are in report.html."""


def select(report: Any, where: str) -> dict[str, Any]:
    """The printed parts of a report. OperatorError if the document is none."""
    if not isinstance(report, dict) or not {"run", "state", "base", "tuned", "train"} <= report.keys():
        raise OperatorError(f"{where} is not a run's report. Remove it and run `python -m trainer report` again.")
    result = {key: report[key] for key in KEYS if key in report}
    result["difference"] = {name: {k: v for k, v in d.items() if k != "bounds"} for name, d in report.get("difference", {}).items()}
    return result


def results(run_dir: Path) -> dict[str, Any]:
    """The figures of the run whose directory this is. OperatorError says how far the run is if it has no report yet."""
    path = run_dir / "report.json"
    if not path.is_file():
        raise OperatorError(f"The run {run_dir.name} has no report yet{_progress(run_dir)}.")
    try:
        return select(json.loads(path.read_text(encoding="utf-8")), str(path))
    except ValueError as error:
        raise OperatorError(f"{path} is not valid JSON: {error}. Remove it and run `python -m trainer report` again.") from None


def _progress(run_dir: Path) -> str:
    try:
        progress = json.loads((run_dir / "progress.json").read_text(encoding="utf-8"))
        return f": {progress['stage']}, {progress['percent']:.0f} % ({progress['message']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def newest(runs: Path) -> Path:
    """The run directory with the newest report; if none has one, the newest run directory. OperatorError if there is none."""
    reports = list(runs.glob("*/report.json"))
    if reports:
        return max(reports, key=lambda p: p.stat().st_mtime).parent
    started = [p.parent for p in runs.glob("*/run.yaml")]
    if not started:
        raise OperatorError(f"There is no run in {runs}. Start one with `make up` or `make try`, or name another storage with "
                            "--storage DIR.")
    return max(started, key=lambda p: (p / "run.yaml").stat().st_mtime)


def from_pod(namespace: str, run: str) -> dict[str, Any]:
    """The figures of a run (default: the newest report) as a pod of the namespace sees the shared storage."""
    import kubernetes

    from tools.runs import PodStore, read_report

    layout = Layout()
    kubernetes.config.load_kube_config(str(layout.kubeconfig) if layout.kubeconfig.exists() else None)
    store = PodStore.find(kubernetes.client.CoreV1Api(), namespace)
    known = [run] if run else store.runs()
    if not known:
        raise OperatorError(f"No run in {store.describe()} has a report yet.")
    return select(read_report(store, known[0]), store.describe())


def _main(arguments: argparse.Namespace) -> int:
    if arguments.namespace:
        found = from_pod(arguments.namespace, arguments.name)
    else:
        runs = Path(arguments.storage or Layout().storage) / "runs"
        directory = runs / arguments.name if arguments.name else newest(runs)
        if not directory.is_dir():
            known = ", ".join(sorted(p.name for p in runs.glob("*"))) or "none"
            raise OperatorError(f"{runs} has no run {arguments.name}. There are: {known}.")
        found = results(directory)
    print(json.dumps(found, indent=1, ensure_ascii=False))
    return 0


def add_parser(commands: Any) -> None:
    """Add the command `results`."""
    command = commands.add_parser("results", help="the figures of the last run's report as one JSON object")
    command.add_argument("--run", dest="name", default="", metavar="ID", help="id of the run (default: the newest)")
    command.add_argument("--storage", default="", help="directory of the shared storage (default: the local environment's)")
    command.add_argument("--namespace", default="", help="read through a pod of this namespace instead")
    command.set_defaults(run=_main)
