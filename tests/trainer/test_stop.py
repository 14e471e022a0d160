"""Being asked to end through the drain file, with the chart's own preStop hook on the other side."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from trainer.train import stop

WORKER = Path(__file__).resolve().parents[2] / "charts/llm-finetune/charts/ray-cluster/templates/_worker.tpl"


@pytest.fixture
def drain(tmp_path, monkeypatch):
    file = tmp_path / "drain"
    monkeypatch.setenv("LLM_FINETUNE_DRAIN_FILE", str(file))
    return file


def hook(drain: Path, grace: int = 30) -> subprocess.Popen:
    """The preStop hook up to where it stops Ray."""
    text = WORKER.read_text()
    script = text[text.index("shopt -s nullglob"):text.index("exec ray stop")]
    script = re.sub(r"\{\{ sub .*? \}\}", str(grace), script)
    return subprocess.Popen(["bash", "-c", script], env={**os.environ, "LLM_FINETUNE_DRAIN_FILE": str(drain)})


def test_the_hook_waits_until_the_state_is_saved(drain):
    with stop.watching(every_s=0.05) as asked:
        assert drain.with_name(f"drain.busy.{os.getpid()}").exists() and not asked.is_set()
        waiting = hook(drain)
        assert asked.wait(5), "the training loop hears of it"
        time.sleep(1.2)
        assert waiting.poll() is None, "the hook waits for the checkpoint"
    assert waiting.wait(5) == 0
    assert [p.name for p in drain.parent.iterdir()] == ["drain"]


def test_the_hook_does_not_wait_for_a_process_that_is_gone(drain):
    gone = subprocess.Popen(["true"])
    gone.wait()
    drain.with_name(f"drain.busy.{gone.pid}").touch()
    assert hook(drain).wait(5) == 0


def test_the_hook_waits_no_longer_than_the_grace_period(drain):
    with stop.watching(every_s=0.05):
        began = time.monotonic()
        assert hook(drain, grace=2).wait(10) in (0, 1)
        assert 1 < time.monotonic() - began < 5


def test_a_drain_of_the_container_before_is_not_meant(drain):
    drain.touch()
    os.utime(drain, (time.time() - 60, time.time() - 60))
    with stop.watching(every_s=0.05) as asked:
        assert not asked.wait(0.5)
        drain.touch()
        assert asked.wait(5)


def test_without_the_variable_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("LLM_FINETUNE_DRAIN_FILE", raising=False)
    with stop.watching() as asked:
        assert not asked.is_set()
