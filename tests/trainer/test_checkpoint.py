"""Checkpoints: any world size reads them, broken ones are passed over, nothing half-written is ever seen as whole."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer import tiny
from tests.trainer.workers import Workers
from trainer.checkpoint import format as tensors
from trainer.checkpoint import saver, store
from trainer.checkpoint.format import BrokenCheckpoint
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.saver import Checkpointer, restore
from trainer.config import CheckpointConfig
from trainer.errors import UserError
from trainer.train.ranks import Ranks

STATE = {"planner": {}, "loop": {"finished": ""}, "metrics": {}}


def save(directory, *steps, config=None, digest="d", engine=None):
    """Save an engine at each step; returns it and the outcomes."""
    engine = engine or tiny.TinyEngine(1, 0, 1)
    checkpointer = Checkpointer(directory, config or CheckpointConfig(keep_last=9), digest, engine)
    outcomes = []
    for step in steps:
        with torch.no_grad():
            next(engine.model.parameters()).fill_(float(step))
        checkpointer.save(step, STATE)
        checkpointer.wait()
        outcomes += checkpointer.outcomes()
    return engine, outcomes


def restored(directory, digest="d"):
    engine = tiny.TinyEngine(2, 0, 1)
    state = restore(directory, digest, engine, Ranks())
    return state, engine


def test_what_is_saved_is_read_back(tmp_path):
    engine, _ = save(tmp_path, 3)
    state, other = restored(tmp_path)
    assert state["step"] == 3
    for (name, a), (_, b) in zip(engine._state(), other._state(), strict=True):
        assert torch.equal(a, b), name
    assert [p.name for p in tmp_path.iterdir()] == ["step-3"]


def test_files_are_plain_safetensors(tmp_path):
    from safetensors import safe_open

    engine, _ = save(tmp_path, 1)
    with safe_open(tmp_path / "step-1" / "rank-00000.safetensors", "pt") as file:
        assert set(file.keys()) == {f"{name}@0" for name, _ in engine._state()}
        for name, tensor in engine._state():
            assert torch.equal(file.get_tensor(f"{name}@0"), tensor.view(-1))


def test_no_module_of_the_format_can_unpickle():
    for module in (tensors, saver, store):
        source = Path(module.__file__).read_text(encoding="utf-8")
        assert "pickle" not in source and "torch.load" not in source


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.int64])
def test_ranges_and_types(tmp_path, dtype):
    """Reads that begin and end anywhere, over pieces of three ranks and several types, some of them empty."""
    whole = torch.arange(101).to(dtype)
    cuts = [0, 7, 7, 60, 101]
    from trainer.engines.base import Piece

    (tmp_path / "step-1").mkdir()
    files = {}
    for rank in range(4):
        pieces = [Piece("weights/a", (101,), cuts[rank], whole[cuts[rank]:cuts[rank + 1]]),
                  Piece(f"weights/odd{rank}", (3, 1), 0, torch.full((3,), rank, dtype=torch.uint8))]
        layout = tensors.Layout(pieces, {})
        buffer = torch.empty(layout.size, dtype=torch.uint8)
        layout.copy(pieces, buffer, 0)
        size, digest = tensors.write(tmp_path / "step-1" / f"rank-{rank:05d}.safetensors", layout.header, [buffer])
        files[f"rank-{rank:05d}.safetensors"] = {"size": size, "sha256": digest.hex()}
    (tmp_path / "step-1" / "state.json").write_text('{"step": 1}')
    (tmp_path / "step-1" / "manifest.json").write_text(json.dumps({"files": files}))
    reader = CheckpointReader(tmp_path / "step-1")
    assert reader.names() == ["weights/a", *(f"weights/odd{r}" for r in range(4))] and reader.dtype("weights/a") == dtype
    assert reader.shape("weights/odd2") == (3, 1) and reader.tensor("weights/odd2").tolist() == [[2]] * 3
    assert reader.verify() is None
    assert torch.equal(reader.tensor("weights/a"), whole)
    for start, count in [(0, 0), (0, 101), (5, 4), (7, 1), (59, 2), (60, 41), (100, 1), (101, 0)]:
        out = torch.empty(count, dtype=torch.float64)
        reader.read("weights/a", start, out)
        assert torch.equal(out, whole[start:start + count].double())
    with pytest.raises(IndexError):
        reader.read("weights/a", 100, torch.empty(2))


def test_save_goes_on_while_the_state_changes(tmp_path, monkeypatch):
    """The state may be changed as soon as `before_update` returns; what is written is the state at the call."""
    engine = tiny.TinyEngine(1, 0, 1)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), "d", engine)
    import threading

    go = threading.Event()
    write = tensors.write
    monkeypatch.setattr(saver.tensors, "write", lambda *a: (go.wait(10), write(*a))[1])
    before = [t.clone() for _, t in engine._state()]
    checkpointer.save(1, STATE)
    checkpointer.before_update()
    assert checkpointer.busy
    with pytest.raises(RuntimeError, match="still being written"):
        checkpointer.save(2, STATE)
    for _, tensor in engine._state():
        tensor.fill_(-1.0)
    go.set()
    checkpointer.wait()
    _, other = restored(tmp_path)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, other._state(), strict=True))


def test_host_buffer_is_reused(tmp_path):
    engine = tiny.TinyEngine(1, 0, 1)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), "d", engine)
    places = set()
    for step in (1, 2, 3):
        checkpointer.save(step, STATE)
        checkpointer.wait()
        places.add(checkpointer._blocks[0].data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize("block", [1, 24, 100, 1000, 1 << 20])
def test_blocks_hold_the_same_bytes_wherever_they_are_cut(tmp_path, monkeypatch, block):
    """In blocks for everything, and through two blocks as from a GPU when the host has no room."""
    monkeypatch.setattr(saver, "BLOCK", block)
    engine = tiny.TinyEngine(1, 0, 1)
    pieces = engine.pieces()[:3]
    layout = tensors.Layout(pieces, {})
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), "d", engine)
    expected = b"".join(pieces[i].tensor.contiguous().view(torch.uint8).numpy().tobytes() for i, _ in layout.entries)
    for hold in (True, False):
        assert b"".join(b.numpy().tobytes() for b in checkpointer._copy(layout, pieces, None, hold)) == expected
        assert bool(checkpointer._blocks) is not hold, "a state that stands still is not copied"
    checkpointer._blocks = checkpointer._blocks[:2]
    assert b"".join(b.numpy().tobytes() for b in checkpointer._staged(layout, pieces)) == expected


def test_without_room_for_a_copy_the_update_waits_for_the_file(tmp_path, monkeypatch):
    import threading

    engine = tiny.TinyEngine(1, 0, 1)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), "d", engine)
    monkeypatch.setattr(saver, "host_memory_free", lambda: 0)
    write, go = tensors.write, threading.Event()
    monkeypatch.setattr(saver.tensors, "write", lambda *a: (go.wait(10), write(*a))[1])
    before = [t.clone() for _, t in engine._state()]
    checkpointer.save(1, STATE)
    updated = []
    thread = threading.Thread(target=lambda: (checkpointer.before_update(), [t.fill_(-1.0) for _, t in engine._state()], updated.append(1)))
    thread.start()
    thread.join(0.3)
    assert not updated
    go.set()
    thread.join(10)
    checkpointer.wait()
    assert updated and not checkpointer._blocks
    _, other = restored(tmp_path)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, other._state(), strict=True))


def test_memory_of_the_container_is_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "CGROUP", tmp_path)
    assert saver.host_memory_free() > 1 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert saver.host_memory_free() > 1 << 20
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 700\ninactive_file 150\n")
    assert saver.host_memory_free() == 250


def damage_truncate(path):
    os.truncate(path / "rank-00000.safetensors", (path / "rank-00000.safetensors").stat().st_size // 2)


def damage_flip(path):
    with open(path / "rank-00000.safetensors", "r+b") as file:
        file.seek(-100, 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def damage_missing(path):
    (path / "rank-00000.safetensors").unlink()


def damage_manifest(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[:len(text) // 2])


def damage_no_manifest(path):
    (path / "manifest.json").unlink()


def damage_state(path):
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"planner"', '"plannex"'))


def damage_header(path):
    with open(path / "rank-00000.safetensors", "r+b") as file:
        file.write((1 << 60).to_bytes(8, "little"))


def damage_emptied(path):
    for file in path.iterdir():
        file.unlink()


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_missing, damage_manifest, damage_no_manifest, damage_state,
                                    damage_header, damage_emptied], ids=lambda f: f.__name__)
def test_broken_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, damage):
    save(tmp_path, 1, 2)
    damage(tmp_path / "step-2")
    state, engine = restored(tmp_path)
    assert state["step"] == 1 and float(next(engine.model.parameters()).detach()[0, 0]) == 1.0
    assert any("step-2" in r.message and "passed over" in r.message for r in caplog.records if r.levelname == "WARNING")


def test_nothing_whole_means_a_start_from_the_beginning(tmp_path):
    save(tmp_path, 1)
    damage_missing(tmp_path / "step-1")
    assert restored(tmp_path)[0] is None
    assert restored(tmp_path / "none")[0] is None


def test_broken_step_is_replaced_when_it_is_reached_again(tmp_path):
    save(tmp_path, 1, 2)
    damage_truncate(tmp_path / "step-2")
    _, outcomes = save(tmp_path, 2)
    assert outcomes[0].saved and restored(tmp_path)[0]["step"] == 2


def test_other_configuration_is_refused(tmp_path):
    save(tmp_path, 1, digest="one")
    with pytest.raises(UserError, match="another configuration"):
        restored(tmp_path, digest="two")


def test_leftovers_of_an_interrupted_save_are_swept_and_never_read(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-1", tmp_path / ".step-2.0123456789ab")
    assert [s.step for s in store.whole(tmp_path)] == [1]
    save(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-3"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("place", ["write", "fsync", "manifest"])
def test_failed_write_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, error, place):
    save(tmp_path, 1)

    def fail(*_a, **_k):
        raise OSError(error, os.strerror(error))

    target = {"write": (tensors.os, "write"), "fsync": (tensors.os, "fsync"), "manifest": (saver, "write_json")}[place]
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        _, (outcome,) = save(tmp_path, 2)
    assert not outcome.saved
    assert ("full" in outcome.message) == (error in (errno.ENOSPC, errno.EDQUOT))
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert restored(tmp_path)[0]["step"] == 1
    _, (outcome,) = save(tmp_path, 3)
    assert outcome.saved


def test_room_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    monkeypatch.setattr(tensors.os, "write", lambda *_: pytest.fail("nothing may be written"))
    _, (outcome,) = save(tmp_path, 1)
    assert not outcome.saved and "the storage is full" in outcome.message and "GB are needed" in outcome.message


def test_retention(tmp_path):
    engine = tiny.TinyEngine(1, 0, 1)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep_last=2, keep_best=1), "d", engine)
    for step, loss in enumerate([None, 0.5, 0.9, None, 0.7], start=1):
        checkpointer.save(step, {**STATE, "metrics": {} if loss is None else {"eval_loss": loss}})
        checkpointer.wait()
    assert [s.step for s in store.whole(tmp_path)] == [2, 4, 5]
    assert store.best(tmp_path).step == 2 and store.newest(tmp_path).step == 5


def test_reader_refuses_gaps_and_foreign_files(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "step-1"
    text = (path / "rank-00000.safetensors").read_bytes()
    size = int.from_bytes(text[:8], "little")
    header = json.loads(text[8:8 + size])
    for change in ("gap", "outside", "type", "negative"):
        changed = json.loads(json.dumps(header))
        key = "weights/0.weight@0"
        if change == "gap":
            changed["weights/0.weight@1"] = changed.pop(key)
        elif change == "outside":
            changed[key]["data_offsets"] = [0, 1 << 40]
        elif change == "type":
            changed[key]["dtype"] = "P64"
        else:
            changed["weights/0.weight@-1"] = changed.pop(key)
        new = json.dumps(changed).encode()
        (path / "rank-00000.safetensors").write_bytes(len(new).to_bytes(8, "little") + new + text[8 + size:])
        with pytest.raises(BrokenCheckpoint):
            CheckpointReader(path)


# Several ranks ------------------------------------------------------------------------------------------------------------------


def case_save(rank, world, directory, fail_rank=-1):
    """In a rank's process: save an engine whose state is a function of its seed."""
    engine = tiny.TinyEngine(7, rank, world)
    checkpointer = Checkpointer(Path(directory), CheckpointConfig(), "d", engine)
    write = tensors.write
    if rank == fail_rank:
        def full(*_):
            raise OSError(errno.ENOSPC, "no room")
        saver.tensors.write = full
    try:
        checkpointer.save(5, STATE)
        checkpointer.wait()
    finally:
        saver.tensors.write = write
    (outcome,) = checkpointer.outcomes()
    return outcome.saved, outcome.message


def case_restore(rank, world, directory):
    engine = tiny.TinyEngine(8, rank, world)
    state = restore(Path(directory), "d", engine, Ranks())
    return (state or {}).get("step"), [t.numpy() for _, t in engine._state()]


@pytest.fixture(scope="module")
def pool():
    with Workers() as p:
        yield p


def test_every_world_size_reads_every_other(tmp_path, pool):
    truth = [t.numpy() for _, t in tiny.TinyEngine(7, 0, 1)._state()]
    for saving in (1, 2, 3):
        directory = str(tmp_path / f"by-{saving}")
        assert pool.run(saving, "tests.trainer.test_checkpoint:case_save", {"directory": directory}) == [(True, "")] * saving
        for reading in (1, 2, 3):
            for step, state in pool.run(reading, "tests.trainer.test_checkpoint:case_restore", {"directory": directory}):
                assert step == 5 and all(np.array_equal(a, b) for a, b in zip(truth, state, strict=True))


def test_failure_of_one_rank_fails_the_save_on_all(tmp_path, pool):
    results = pool.run(2, "tests.trainer.test_checkpoint:case_save", {"directory": str(tmp_path), "fail_rank": 1})
    assert [saved for saved, _ in results] == [False, False] and all("full" in message for _, message in results)
    assert list(tmp_path.iterdir()) == []


def test_damage_that_one_rank_sees_is_passed_over_by_all(tmp_path, pool):
    pool.run(2, "tests.trainer.test_checkpoint:case_save", {"directory": str(tmp_path)})
    shutil.copytree(tmp_path / "step-5", tmp_path / "step-9")
    with open(tmp_path / "step-9" / "rank-00001.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert [step for step, _ in pool.run(2, "tests.trainer.test_checkpoint:case_restore", {"directory": str(tmp_path)})] == [5, 5]


def manifest_without_a_rank(manifest):
    del manifest["files"]["rank-00000.safetensors"]


@pytest.mark.parametrize("change", [
    manifest_without_a_rank, lambda m: m["files"].pop("state.json"), lambda m: m.pop("world"), lambda m: m.update(world=10**12),
    lambda m: m.update(world="1"), lambda m: m.update(files=[]),
    lambda m: m["files"].update({"../step-1/state.json": {"size": 1, "sha256": ""}}),
    lambda m: m["files"]["state.json"].update(size=True), lambda m: m["files"]["state.json"].update(sha256="0" * 64),
    lambda m: m["files"].update({"/etc/hostname": {"size": 1, "sha256": "0"}}), lambda m: m["files"].update({"\x00": {}}),
])
def test_a_manifest_that_was_changed_is_not_believed(tmp_path, change):
    """Found by tests/fuzz/trainer/test_fuzz_manifests.py, or of that kind; each is passed over for the checkpoint before."""
    save(tmp_path, 1, 2)
    path = tmp_path / "step-2" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    assert [s.step for s in store.whole(tmp_path)] == [1] and restored(tmp_path)[0]["step"] == 1


@pytest.mark.parametrize("state", ['{"step": 2, "metrics": {"eval_loss": "1"}, "config_sha256": "d"}', "[" * 9000, '{"step": 1e999}',
                                   '{"step": 2, "metrics": {"eval_loss": NaN}, "config_sha256": "d"}'])
def test_a_state_that_was_changed_with_its_manifest_breaks_nothing(tmp_path, state):
    save(tmp_path, 1, 2)
    (tmp_path / "step-2" / "state.json").write_text(state)
    path = tmp_path / "step-2" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["state.json"] = {"size": len(state), "sha256": saver.sha256(tmp_path / "step-2" / "state.json")}
    path.write_text(json.dumps(manifest))
    assert [s.step for s in store.whole(tmp_path)] == [1] and store.best(tmp_path).step == 1


@pytest.mark.parametrize(("old", "new"), [
    (b'"shape":[', b'"shape":[ 1e0,'), (b'"data_offsets":[0,', b'"data_offsets":[0.0,'), (b'"data_offsets":[0,', b'"data_offsets":[-8,'),
    (b'\\"weights/0.weight\\": [64, 12]', b'\\"weights/0.weight\\": [-64, -12]'),
    (b'\\"weights/0.weight\\": [64, 12]', b'\\"weights/0.weight\\": [1e999]'), (b'{"__metadata__"', b"[" * 9000),
])
def test_a_header_that_lies_is_found(tmp_path, old, new):
    save(tmp_path, 1)
    path = tmp_path / "step-1" / "rank-00000.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8:8 + size]
    assert old in header
    header = header.replace(old, new, 1)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size:])
    with pytest.raises(BrokenCheckpoint):
        CheckpointReader(tmp_path / "step-1")
