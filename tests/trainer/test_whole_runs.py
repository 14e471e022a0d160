"""Whole runs of `python -m trainer run` on this machine (a small random Llama, one worker), with what goes wrong around them: damaged
checkpoints, a second run of the same id, a full disk; and that a run's secrets show up nowhere. Minutes: `make test-slow`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.trainer.test_launch import storage
from trainer.checkpoint.saver import SPARE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEP, LAST = 20, 40
"""Steps between checkpoints; the newest one when training is interrupted."""

Interrupted = tuple[Path, Path, list[tuple[int, float]]]


def prepared(directory: Path, **changes: Any) -> Path:
    """A storage and the configuration file of a run with one worker."""
    path = storage(directory)
    document = json.loads(path.read_text())
    document["resources"] = {"workers": 1, "cpus_per_worker": 1, "max_failures": 0}
    document["run"]["checkpoint"] = {"every_steps": STEP, "keep_last": 2}
    document["run"]["train"] |= {"epochs": 12, **changes}
    document["run"]["model"]["architecture"]["vocab_size"] = 512
    path.write_text(json.dumps(document))
    return path


def start(path: Path, name: str, command: str = "run", **environment: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "HF_TOKEN")}
    return subprocess.Popen([sys.executable, "-m", "trainer", command, "--config", str(path), "--id", name], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env={**env, "OMP_NUM_THREADS": "1", **environment})


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a run printed; it must have ended with this code."""
    text = process.communicate(timeout=900)[0]
    assert process.returncode == code, text
    return text


def until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def curve(root: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in map(json.loads, (root / "metrics.jsonl").read_text().splitlines())]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """The configuration, a run that was killed with checkpoints of two steps, and the undisturbed run's losses."""
    directory = tmp_path_factory.mktemp("storage")
    path = prepared(directory)
    ended(start(path, "faults-whole"))
    whole = curve(directory / "runs" / "faults-whole")
    assert whole[-1][0] > LAST
    killed = directory / "runs" / "faults-killed"
    ended(start(path, "faults-killed", "prepare"))
    process = start(path, "faults-killed", "train")
    until((killed / "checkpoints" / f"step-{LAST}" / "manifest.json").exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    for newer in (killed / "checkpoints").glob("*"):  # what the run wrote before the signal came
        if newer.name not in (f"step-{LAST - STEP}", f"step-{LAST}"):
            shutil.rmtree(newer)
    assert sorted(p.name for p in (killed / "checkpoints").iterdir()) == [f"step-{LAST - STEP}", f"step-{LAST}"]
    return path, killed, whole


def truncated(checkpoint: Path) -> None:
    file = checkpoint / "rank-00000.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def flipped(checkpoint: Path) -> None:
    file = checkpoint / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    file.write_bytes(content)


def missing(checkpoint: Path) -> None:
    (checkpoint / "rank-00000.safetensors").unlink()


def half_written(checkpoint: Path) -> None:
    file = checkpoint / "manifest.json"
    file.write_bytes(file.read_bytes()[:60])


@pytest.mark.parametrize("damage", [truncated, flipped, missing, half_written], ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_passed_over(interrupted: Interrupted, damage: Callable[[Path], None]) -> None:
    path, killed, whole = interrupted
    name = f"faults-{damage.__name__.replace('_', '-')}"
    root = killed.parent / name
    shutil.copytree(killed, root)
    damage(root / "checkpoints" / f"step-{LAST}")
    text = ended(start(path, name))
    assert f"step-{LAST} is" in text and "passed over" in text and f"Going on after step {LAST - STEP}" in text, text
    assert curve(root) == whole
    assert json.loads((root / "report.json").read_text())["state"] == "finished"


def test_a_second_run_of_the_same_id_is_refused(tmp_path: Path) -> None:
    path = prepared(tmp_path)
    first = start(path, "faults-twice", RAYJOB_NAME="faults-twice-of-ada")
    root = tmp_path / "runs" / "faults-twice"
    until((root / "lock.json").exists, first)
    second = ended(start(path, "faults-twice", RAYJOB_NAME="faults-twice-of-bob"), 2)
    assert "Error: Run faults-twice is being worked on by RayJob faults-twice-of-ada on" in second and "Traceback" not in second
    ended(first)
    assert not (root / "lock.json").exists() and json.loads((root / "report.json").read_text())["state"] == "finished"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a checkpoint, and not much more than the trainer leaves free."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    directory = tmp_path / "disk"
    directory.mkdir()
    size = (SPARE >> 20) + 24
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", directory], check=False).returncode:
        pytest.skip("this machine does not let tests mount")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_says_so(small_disk: Path) -> None:
    path = prepared(small_disk)
    root, ballast = small_disk / "runs" / "faults-full", small_disk / "ballast"
    ended(start(path, "faults-full", "prepare"))
    process = start(path, "faults-full", "train")
    until(lambda: any((root / "checkpoints").glob("step-*")), process)
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - (16 << 20)))  # less than is left free, enough to say so
    until(lambda: "was not saved" in (root / "progress.json").read_text(), process)
    kept = sorted((root / "checkpoints").glob("step-*"))
    progress = json.loads((root / "progress.json").read_text())
    assert kept and "the storage is full" in progress["message"]
    ballast.unlink()
    text = ended(process)
    assert "was not saved: the storage is full" in text and "The older checkpoints stay" in text
    assert "Traceback" not in text
    assert curve(root)[-1][0] > LAST


def processes(driver: int) -> list[psutil.Process]:
    try:
        top = psutil.Process(driver)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def found(directory: Path, secrets: tuple[str, ...]) -> list[str]:
    """Files below a directory that hold one of the secrets."""
    files = [p for p in directory.rglob("*") if p.is_file() and not p.is_symlink()]
    assert files, directory
    return [str(p) for p in files if any(secret.encode() in p.read_bytes() for secret in secrets)]


def test_secrets_show_up_nowhere(tmp_path: Path) -> None:
    """HF_TOKEN and Ray's token as canaries in the environment of a whole run, and of one that fails with a traceback of a worker."""
    secrets = ("hf_CANARYcanary0123456789abcdefABCD", "ray-canary-7b1c2d3e4f5061728394a5b6c7d8e9f0")
    logs = Path("/tmp") / f"ray-{os.getpid()}"  # short: Ray makes sockets below it
    tokens = {"HF_TOKEN": secrets[0], "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets[1], "RAY_TMPDIR": str(logs)}
    logs.mkdir()
    try:
        path = prepared(tmp_path / "storage")
        process = start(path, "faults-canary", **tokens)
        arguments: set[str] = set()
        text = ""
        while process.poll() is None:
            for one in processes(process.pid):
                with contextlib.suppress(psutil.Error):
                    arguments.add(" ".join(one.cmdline()))
            time.sleep(0.2)
            assert len(arguments) < 5000
        text = ended(process)
        assert len(arguments) >= 5 and any("raylet" in a for a in arguments), arguments
        assert not [a for a in arguments for secret in secrets if secret in a]

        root = tmp_path / "storage" / "runs" / "faults-canary"
        (root / "report.json").unlink()
        (root / "evaluation.json").unlink()
        (root / "evaluation.json").mkdir()  # what is written there next raises in a worker
        text += ended(start(path, "faults-canary", **tokens), 1)
        (tmp_path / "output").mkdir()
        (tmp_path / "output" / "text").write_text(text)
        assert "Traceback" in text and "IsADirectoryError" in text
        for directory in (tmp_path / "storage", tmp_path / "output", logs):
            assert found(directory, secrets) == []
    finally:
        shutil.rmtree(logs, ignore_errors=True)
