"""`make up`, ended three times at different points and repeated, comes to the same end; what `make down` must restore is written down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.host import snapshot
from tools.cluster import status
from tools.cluster.down import down
from tools.cluster.settings import Settings
from tools.layout import REPOSITORY, Layout

INTERRUPTS = [("node services: done", signal.SIGINT), ("Kubernetes ... ", signal.SIGTERM), ("first run ... ", signal.SIGKILL)]
"""What `make up` prints when it is interrupted, and how: a Ctrl-C, a polite end, a power cut of the process."""
PATIENCE = 5.0
"""Seconds after the line: into the step, not between two."""


def make_up(layout: Layout, log: Path, until: str = "", how: signal.Signals | None = None) -> int:
    """Run it; once it has printed `until`, interrupt its whole process group, as a terminal does. Returns its exit code."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PATH": f"{layout.bin}:{os.environ['PATH']}"}
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, "-u", "-m", "tools", "up"], cwd=REPOSITORY, env=env, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        assert process.stdout is not None
        timer: threading.Timer | None = None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
            if how is not None and until in line and timer is None:
                timer = threading.Timer(PATIENCE, os.killpg, (process.pid, how))
                timer.start()
        code = process.wait()
        if timer is not None:
            timer.cancel()
    return code


@pytest.mark.timeout(5400)
def test_interrupted_three_times_it_comes_to_the_same_end(layout: Layout, snapshot_file: Path, tmp_path: Path) -> None:
    settings = Settings()
    down(layout, settings)
    time.sleep(2)
    snapshot_file.parent.mkdir(parents=True, exist_ok=True)
    snapshot_file.write_text(json.dumps(snapshot.take(layout), indent=1))
    for number, (line, how) in enumerate(INTERRUPTS):
        log = tmp_path / f"{number}.log"
        code = make_up(layout, log, line, how)
        assert code != 0, f"it was to be ended by {how.name} after {line!r}, but came to its end:\n{log.read_text()[-2000:]}"
        assert line in log.read_text(), f"it failed before {line!r}:\n{log.read_text()[-2000:]}"
    log = tmp_path / "last.log"
    assert make_up(layout, log) == 0, log.read_text()[-3000:]
    assert status.served_run(settings) == status.newest_run(layout) != ""
