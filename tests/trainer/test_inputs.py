"""What a run was begun with must stay as it was: base model, dataset; and what ends by an error ends in order."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import tiny
from trainer import inputs, stages
from trainer.config import Config
from trainer.data.prepare import prepare
from trainer.errors import UserError
from trainer.files import write_directory
from trainer.paths import RunPaths
from trainer.train.ranks import Ranks

ROWS = [{"id": f"g{i}", "question": f"Does remedy {i} help patient {i * 7}?", "answer": f"Remedy {i} helped {i * 13} people.",
         "decision": "yes"} for i in range(30)]


def begun(make_config: Callable[..., Config], **run: Any) -> tuple[Config, RunPaths, Path]:
    """A run whose base model's files are recorded; the model's directory."""
    config = make_config(**run)
    paths = RunPaths.of(config)
    inputs.check(config, paths)
    return config, paths, config.storage_path / config.run.model.path


def refused(config: Config, paths: RunPaths, *told: str) -> None:
    with pytest.raises(UserError) as caught:
        inputs.check(config, paths)
    for part in (*told, "Put the files back", "run.name", str(paths.inputs)):
        assert part in str(caught.value)


def test_a_base_model_that_stays_is_fine(make_config: Callable[..., Config]) -> None:
    config, paths, model = begun(make_config)
    (model / "tokenizer.json").touch()  # another time of change is no change
    (model / "README.md").write_text("of no use to the run")
    inputs.check(config, paths)
    assert {"tokenizer.json", "tokenizer_config.json"} <= json.loads(paths.inputs.read_text())["base_model"].keys()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_changed_file_is_named(make_config: Callable[..., Config], name: str) -> None:
    config, paths, model = begun(make_config)
    content = (model / name).read_bytes()
    (model / name).write_bytes(content.replace(b"e", b"f", 1))
    refused(config, paths, f"{name} (has other content)")
    (model / name).unlink()
    refused(config, paths, f"{name} (is gone)")
    (model / name).write_bytes(content)
    (model / "added_tokens.json").write_text("{}")
    refused(config, paths, "added_tokens.json (is new)")


def test_prepare_and_the_workers_look(make_config: Callable[..., Config]) -> None:
    config, _paths, model = begun(make_config)
    (model / "tokenizer_config.json").write_text("{}")
    for stage in (lambda: stages.prepare(config), lambda: stages.work(config, ["train"], torch.device("cpu")),
                  lambda: stages.work(config, ["evaluate"], torch.device("cpu"))):
        with pytest.raises(UserError, match=r"tokenizer_config.json \(has other content\)"):
            stage()


def test_large_weights_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any block, the header wherever it ends, and the size count; a start reads little of them."""
    monkeypatch.setattr(inputs, "WHOLE", 1 << 20)
    monkeypatch.setattr(inputs, "BLOCK", 1 << 10)
    header = json.dumps({"__metadata__": {"x": "y" * 300_000}}).encode()
    content = bytearray(len(header).to_bytes(8, "little") + header + bytes(8 << 20))
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    first = inputs.digest(path)
    assert first.startswith("sampled-")
    for at in (20, 250_000, len(header), len(content) - 1, (len(content) - 1024) * 31 // 63 + 5):
        content[at] ^= 1
        path.write_bytes(content)
        assert inputs.digest(path) != first, at
        content[at] ^= 1
    path.write_bytes(content + b"\0")
    assert inputs.digest(path) != first
    path.write_bytes(content)
    assert inputs.digest(path) == first


def test_hub_models_and_missing_directories_have_nothing_to_compare(tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    inputs.check(config, RunPaths.of(config))
    assert not RunPaths.of(config).inputs.exists()


def test_a_torn_record_says_so(make_config: Callable[..., Config]) -> None:
    config, paths, _ = begun(make_config)
    paths.inputs.write_text('{"base_model": {"tok')
    with pytest.raises(UserError, match=r"inputs.json is not readable .* Remove it"):
        inputs.check(config, paths)


def test_a_dataset_that_changes_under_a_run_is_refused(make_config: Callable[..., Config], tmp_path: Path, tiny_tokenizer: Any,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    rows = tmp_path / "rows.jsonl"
    content = "".join(json.dumps(row) + "\n" for row in ROWS)
    rows.write_text(content)
    (tmp_path / "ids.txt").write_text("g3\n")
    config = make_config({"path": "rows.jsonl", "max_tokens": 128, "exclude_ids": "ids.txt"})
    made = prepare(config, tiny_tokenizer)
    assert prepare(config, tiny_tokenizer) == made and set(made["inputs"]) == {"rows.jsonl", "ids.txt"}
    rows.write_text(content.replace("helped 13 ", "helped 14 "))
    with pytest.raises(UserError, match=r"has changed since this run prepared it: rows.jsonl. Put the files back, or give the run another"):
        prepare(config, tiny_tokenizer)
    rows.write_text(content)
    (tmp_path / "ids.txt").write_text("g4\n")
    with pytest.raises(UserError, match=r"ids.txt"):
        prepare(config, tiny_tokenizer)
    rows.unlink()  # the run has what it needs: it goes on, and says so
    assert prepare(config, tiny_tokenizer) == made and "is gone; the run goes on" in caplog.text


def test_a_dataset_that_changes_while_it_is_read_is_refused(make_config: Callable[..., Config], tmp_path: Path,
                                                            tiny_tokenizer: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = make_config({"path": "rows.jsonl", "max_tokens": 128})

    def append(_share: float, message: str) -> None:
        if "rows read" in message:
            with open(rows, "a") as file:
                file.write(json.dumps({**ROWS[0], "id": "late"}) + "\n")

    with pytest.raises(UserError, match="was changed while it was read"):
        prepare(config, tiny_tokenizer, append)
    assert not RunPaths.of(config).dataset.exists()


def test_training_that_ends_by_an_error_waits_for_the_save_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save reads from the engine's memory, which goes with the engine: the file must be written before that."""
    from trainer import engines
    from trainer.checkpoint import format as tensors
    from trainer.checkpoint import saver, store
    from trainer.train import loop

    config = tiny.config(tmp_path, checkpoint={"every_steps": 3})
    paths = RunPaths.of(config)
    write_directory(paths.dataset, lambda directory: tiny.write_rows(directory) or {})
    order: list[str] = []
    started, failed = threading.Event(), threading.Event()

    class Engine(tiny.TinyEngine):
        def step(self, learning_rate: float) -> torch.Tensor:
            if started.is_set():
                order.append("failed")
                failed.set()
                raise RuntimeError("a fault of the GPU")
            return super().step(learning_rate)

        def close(self) -> None:
            order.append("closed")
            super().close()

    def slow(*arguments: Any) -> Any:
        started.set()
        assert failed.wait(60)
        time.sleep(0.3)  # longer than it takes to leave
        written = write(*arguments)
        order.append("written")
        return written

    write = tensors.write
    monkeypatch.setattr(saver.tensors, "write", slow)
    monkeypatch.setattr(saver, "host_memory_free", lambda: 1 << 40)  # room for a copy: training goes on during the save
    monkeypatch.setattr(engines, "make_engine", lambda config, device, rank, world: Engine(1, rank, world))
    assert loop.Training  # imported before the clock runs
    with pytest.raises(RuntimeError, match="a fault of the GPU"):
        stages.train(config, paths, Ranks(timeout_s=60), torch.device("cpu"))
    assert order == ["failed", "written", "closed"]
    assert [s.step for s in store.whole(paths.checkpoints)] == [3]
