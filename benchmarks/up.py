"""How long `make up` takes, and what it needs: cold (empty caches), warm (after `make down`), unchanged (a second time).

    python benchmarks/up.py --cold --out benchmarks/results/up.jsonl     # removes LLM_FINETUNE_CACHE's content first: asks with --yes
    python benchmarks/up.py                                              # warm and unchanged alone

Needs root and no other load; no local cluster may be running. Memory is the host's (MemTotal - MemAvailable, so that what the page cache
can give back does not count) less what was in use before; disk is what the file system lost while it ran. One JSON object a start.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from record import record

REPOSITORY = Path(__file__).resolve().parent.parent
TARGETS = {"cold": 35 * 60, "warm": 5 * 60, "unchanged": 30}
"""Seconds within which each start is to end on two cores."""


def cache() -> Path:
    """As the Makefile finds it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LLM_FINETUNE_CACHE") or Path(base) / "llm-finetune")


def in_use() -> int:
    """Bytes of the host's memory that cannot be had for something else."""
    fields = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    return (fields["MemTotal"] - fields["MemAvailable"]) << 10


class Watch:
    """Peak memory and disk while it is open."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._end = folder, threading.Event()
        self._memory_before, self._disk_before = in_use(), shutil.disk_usage(folder).used
        self.memory = self.disk = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._end.wait(1.0):
            self.memory = max(self.memory, in_use() - self._memory_before)
            self.disk = max(self.disk, shutil.disk_usage(self._folder).used - self._disk_before)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def make(target: str, log: Path) -> tuple[int, float]:
    """`make <target>`; returns exit code and seconds."""
    began = time.monotonic()
    with open(log, "a") as file:
        code = subprocess.run(["make", target], cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                              check=False).returncode
    return code, time.monotonic() - began


def measure(kind: str, log: Path, memory: int) -> dict[str, Any]:
    """One start. `memory`: bytes in use already by an earlier start's cluster, counted to this one's."""
    with Watch(cache()) as watch:
        code, seconds = make("up", log)
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, text=True).strip()
    return {"start": kind, "exit": code, "seconds": round(seconds, 1), "target_seconds": TARGETS[kind],
            "peak_memory_gib": round((watch.memory + memory) / 2**30, 2), "disk_gib": round(watch.disk / 2**30, 2),
            "cores": os.cpu_count(), "kernel": platform.release(), "commit": commit, "date": time.strftime("%Y-%m-%d")}


def main() -> None:
    """Measure the starts and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cold", action="store_true", help="first empty the cache")
    parser.add_argument("--yes", action="store_true", help="do not ask before the cache is emptied")
    parser.add_argument("--out", default="")
    parser.add_argument("--log", default="/dev/stderr")
    options = parser.parse_args()
    folder = cache()
    make("down", Path(options.log))
    if options.cold:
        if folder.exists() and any(folder.iterdir()) and not options.yes and input(f"Empty {folder}, runs included? [y/N] ") != "y":
            sys.exit("Nothing was changed.")
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    before, worst = in_use(), 0
    for kind in (["cold"] if options.cold else []) + ["warm", "unchanged"]:
        if kind == "warm" and options.cold:
            make("down", Path(options.log))
        result = measure(kind, Path(options.log), max(0, in_use() - before))
        record(result, options.out)
        worst = max(worst, result["exit"], int(result["seconds"] > result["target_seconds"]))
        if result["exit"]:
            break
    sys.exit(worst)


if __name__ == "__main__":
    main()
