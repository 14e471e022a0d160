"""`make lint`, `test-fast`, `test`, `e2e`, `fuzz` and so on: what is run in which order, fast things first, and a summary at the end.

A suite that fails does not hide the next ones; the exit code is that of the worst. The closing line sums up pytest's counts.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass

from tools.layout import REPOSITORY, Layout
from tools.progress import clock

FAST_MARK = "not slow"


@dataclass(frozen=True)
class Check:
    """One command of a suite."""

    name: str
    command: list[str]
    """First word `tools`, `trainer` or `chatbot`: that environment's Python."""


def _pytest(environment: str, *paths: str, mark: str = FAST_MARK, timeout_s: int = 900) -> list[str]:
    return [environment, "-m", "pytest", "-q", "--timeout", str(timeout_s), "-p", "no:cacheprovider", "-m", mark, "-rs", *paths]


LINT = [
    Check("ruff", ["tools", "-m", "ruff", "check", "."]),
    Check("mypy", ["tools", "-m", "mypy", "tools"]),
    Check("environments", ["tools", "-m", "tools", "environments", "check"]),
]
UNIT = [
    # Builds helm if it is missing, and copies the operator's CRDs: the tests below need both.
    Check("chart package", ["tools", "-m", "tools", "charts"]),
    Check("tools", _pytest("tools", "tests/tools")),
    Check("charts", _pytest("tools", "tests/charts")),
    Check("trainer", _pytest("trainer", "tests/trainer")),
    Check("chatbot", _pytest("chatbot", "tests/chatbot")),
]
# Some hundred cases each here, the same every time; `make fuzz` sets FUZZ_CASES and shows how many there were.
FUZZ = [(f"fuzz {environment}", environment, f"tests/fuzz/{part}")
        for environment, part in (("tools", "charts"), ("trainer", "trainer"), ("chatbot", "chatbot"))]
UNIT += [Check(name, _pytest(environment, path)) for name, environment, path in FUZZ]
FUZZED = [UNIT[0], *(Check(name, [*_pytest(environment, path, timeout_s=14400), "--hypothesis-show-statistics"])
                     for name, environment, path in FUZZ)]
SCANNED = [UNIT[0], Check("scanners", _pytest("tools", "tests/scan"))]
CLUSTER = [Check("local cluster up", ["tools", "-m", "tools", "up"]), Check("end to end", _pytest("tools", "tests/e2e"))]
# From no cluster to none: `make up` interrupted and repeated, and what `make down` leaves.
HOST = [Check("up, interrupted", _pytest("tools", "tests/host/test_up.py")), Check("down", _pytest("tools", "tests/host/test_down.py"))]
# Kueue is compiled for it.
LONGER = [Check(name, _pytest("tools", f"tests/e2e/{file}.py", mark="slow"))
          for name, file in (("gang admission", "test_kueue"), ("unequal groups", "test_unequal_groups"), ("upgrade", "test_upgrade"))]
PROMOTION = [CLUSTER[0], Check("promotion", _pytest("tools", "tests/e2e/test_promotion.py", mark="slow"))]
CHAOS = [CLUSTER[0], Check("faults", _pytest("tools", "tests/e2e/test_faults.py", "tests/e2e/test_faults_chatbot.py", mark="slow"))]
NODES = [CLUSTER[0], Check("second node", _pytest("tools", "tests/nodes"))]
# Whole runs with faults, on this machine and without a cluster: minutes each.
SLOW = [Check("trainer, slow", _pytest("trainer", "tests/trainer", mark="slow", timeout_s=3600))]
SUITES = {"lint": LINT, "fast": [*LINT, *UNIT], "all": [*LINT, *UNIT, *CLUSTER], "host": HOST, "e2e": [*CLUSTER, *LONGER, PROMOTION[1]],
          "promotion": PROMOTION, "chaos": CHAOS, "nodes": NODES, "fuzz": FUZZED, "scan": SCANNED, "slow": SLOW}
NOT_RUN = {
    "lint": "tests (make test)",
    "fast": "end-to-end tests on the local cluster (make test)",
    "host": "everything else (make test)",
    "all": "make up and down themselves (make test-host), promotion, gang admission, unequal groups, upgrade (make e2e), "
           "scanners (make scan), faults (make chaos), a second node (make e2e-nodes), benchmarks/",
    "e2e": "lint and unit tests (make test-fast)",
    "promotion": "everything else (make test)",
    "chaos": "everything else (make test)",
    "nodes": "everything else (make test)",
    "fuzz": "everything else (make test)",
    "scan": "everything else (make test)",
    "slow": "everything else (make test)",
}


def _run(check: Check, layout: Layout) -> tuple[int, str]:
    """Run one check, its output shown as it comes. Returns exit code and the last line of output."""
    environment, *rest = check.command
    python = str(layout.cache / "venv" / environment / "bin/python")
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PATH": f"{layout.bin}:{os.environ['PATH']}"}
    process = subprocess.Popen([python, *rest], cwd=REPOSITORY, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, errors="replace")
    last = ""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return process.wait(), last


def main() -> int:
    """Run a suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=sorted(SUITES))
    suite = parser.parse_args().suite
    layout = Layout()
    rows, worst, counts = [], 0, {"passed": 0, "failed": 0, "skipped": 0}
    begin = time.monotonic()
    for check in SUITES[suite]:
        print(f"\n== {check.name}", flush=True)
        since = time.monotonic()
        code, last = _run(check, layout)
        worst = max(worst, code)
        for number, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last):
            counts["failed" if kind.startswith("error") else kind] += int(number)
        rows.append((check.name, "ok" if code == 0 else f"FAILED ({code})", clock(time.monotonic() - since), last[:100]))
    print("\n== summary")
    for name, state, took, last in rows:
        print(f"  {name:18} {state:12} {took:>8}  {last}")
    print(f"  took {clock(time.monotonic() - begin)}; not run: {NOT_RUN[suite]}")
    if counts["passed"] or counts["failed"]:
        print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return worst


if __name__ == "__main__":
    sys.exit(main())
