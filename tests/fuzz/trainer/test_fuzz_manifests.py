"""Whatever has happened to a checkpoint's or a model's files: they are as they were, or they are known to be broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.cases import JSON, cases, changed, damaged
from tests.trainer import tiny
from trainer.checkpoint import store
from trainer.checkpoint.format import BrokenCheckpoint
from trainer.checkpoint.reader import STATE, CheckpointReader
from trainer.checkpoint.saver import Checkpointer, restore
from trainer.config import CheckpointConfig
from trainer.data.shards import TokenShards
from trainer.errors import UserError
from trainer.files import MANIFEST, read_manifest, write_directory
from trainer.train.ranks import Ranks

RANK = "rank-00000.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("checkpoints")
    engine = tiny.TinyEngine(1, 0, 1)
    checkpointer = Checkpointer(directory, CheckpointConfig(keep_last=9), "digest", engine)
    for step in (1, 2):
        checkpointer.save(step, {"planner": {}, "loop": {"finished": ""}, "metrics": {"eval_loss": 3.0 - step}})
        checkpointer.wait()
    shutil.copytree(directory, directory.parent / "whole", dirs_exist_ok=True)
    return directory


def tensors(path: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(path)
    return {name: reader.tensor(name) for name in reader.names()}


def looked_at(saved: Path) -> None:
    """Step 2 has been changed: what restores, exports and retains passes over it, or it says the same as before."""
    whole = saved.parent / "whole" / "step-2"
    found = {s.step: s for s in store.whole(saved, warn=False)}
    assert 1 in found
    assert store.best(saved) is not None and store.newest(saved) is not None
    if 2 in found:
        assert found[2].eval_loss == 1.0 and found[2].config_sha256 == "digest"
    try:
        reader = CheckpointReader(saved / "step-2")
        wrong = reader.verify()
        for name in reader.names():
            reader.tensor(name)  # whatever the header says, reading stays inside the file
    except BrokenCheckpoint as error:
        wrong = str(error)
    assert wrong is None or wrong
    engine = tiny.TinyEngine(2, 0, 1)
    state = restore(saved, "digest", engine, Ranks())
    assert state is not None and state["step"] == (2 if wrong is None and 2 in found else 1)
    expected = tensors(whole if state["step"] == 2 else saved / "step-1")
    assert all(torch.equal(expected[name], tensor) for name, tensor in engine._state())


def put_back(saved: Path, name: str) -> None:
    shutil.copyfile(saved.parent / "whole" / "step-2" / name, saved / "step-2" / name)


@cases(150)
@given(data=st.data(), name=st.sampled_from((RANK, STATE, MANIFEST)))
def test_damaged_checkpoints(saved: Path, data: st.DataObject, name: str) -> None:
    path = saved / "step-2" / name
    path.write_bytes(data.draw(damaged(st.just(path.read_bytes()))))
    try:
        looked_at(saved)
    finally:
        put_back(saved, name)


@cases(150)
@given(data=st.data(), name=st.sampled_from((STATE, MANIFEST)))
def test_changed_documents(saved: Path, data: st.DataObject, name: str) -> None:
    """As above, but the file stays JSON."""
    path = saved / "step-2" / name
    document = json.loads(path.read_text())
    path.write_text(json.dumps(data.draw(changed(st.just(document)))))
    try:
        looked_at(saved)
    finally:
        put_back(saved, name)


def with_header(content: bytes, header: Any) -> bytes:
    """A safetensors file with another header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = int.from_bytes(content[:8], "little")
    return len(text).to_bytes(8, "little") + text + content[8 + size:]


@cases(150)
@given(data=st.data())
def test_changed_headers(saved: Path, data: st.DataObject) -> None:
    """The headers of a rank's file, with the manifest's size and digest to match: whoever writes both may lie, but not break out."""
    path = saved / "step-2" / RANK
    content = path.read_bytes()
    header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
    path.write_bytes(with_header(content, data.draw(changed(st.just(header)) | damaged(st.just(json.dumps(header).encode())))))
    try:
        reader = CheckpointReader(saved / "step-2")
        for name in reader.names():
            reader.tensor(name)
    except BrokenCheckpoint:
        pass
    finally:
        put_back(saved, RANK)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a manifest, and a file beside it that is none of its business."""
    root = tmp_path_factory.mktemp("model")
    (root / "secret").write_text("s")
    write_directory(root / "model", lambda d: (d / "a.txt").write_text("text") and {"step": 3})
    return root / "model"


@cases(300)
@given(data=st.data())
def test_manifests(directory: Path, data: st.DataObject) -> None:
    path = directory / MANIFEST
    content = path.read_bytes()
    new = data.draw(st.one_of(damaged(st.just(content)), changed(st.just(json.loads(content))).map(lambda d: json.dumps(d).encode()),
                              JSON.map(lambda d: json.dumps(d).encode())))
    path.write_bytes(new)
    try:
        for hashes in (False, True):
            manifest = read_manifest(directory, hashes)
            assert manifest is None or isinstance(manifest["files"], dict)
            assert manifest is None or all((directory / name).resolve().is_relative_to(directory.resolve()) for name in manifest["files"])
    finally:
        path.write_bytes(content)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    tiny.write_rows(path, 8, 2)
    return path


@cases(300)
@given(data=st.data())
def test_token_shards(rows: Path, data: st.DataObject) -> None:
    path = rows / "train-00000.safetensors"
    content = path.read_bytes()
    header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
    path.write_bytes(data.draw(st.one_of(damaged(st.just(content)), changed(st.just(header)).map(lambda h: with_header(content, h)))))
    try:
        shards = TokenShards(rows, "train")
        for index in range(len(shards)):
            shards.row(index)
    except UserError:
        pass
    finally:
        path.write_bytes(content)
