"""Token shards and manifests that are not what they were: named, never an exception of numpy or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import tiny
from trainer.data.shards import TokenShards
from trainer.errors import UserError
from trainer.files import MANIFEST, read_manifest, write_directory


@pytest.mark.parametrize("change", [
    lambda h: None, lambda h: [], lambda h: {**h, "__metadata__": {}}, lambda h: {**h, "__metadata__": None},
    lambda h: {**h, "tokens": {**h["tokens"], "data_offsets": [-8, 8]}}, lambda h: {**h, "tokens": {**h["tokens"], "data_offsets": [8, 0]}},
    lambda h: {**h, "tokens": {**h["tokens"], "data_offsets": [0]}}, lambda h: {**h, "tokens": {**h["tokens"], "dtype": "F32"}},
    lambda h: {**h, "tokens": {**h["tokens"], "shape": [10**30]}}, lambda h: {k: v for k, v in h.items() if k != "offsets"},
    lambda h: {**h, "offsets": h["answer_start"]}, lambda h: {**h, "tokens": h["answer_start"]},
])
def test_a_header_that_lies(tmp_path: Path, change: Any) -> None:
    """Found by tests/fuzz/trainer/test_fuzz_manifests.py, or of that kind."""
    tiny.write_rows(tmp_path, 8, 2)
    path = tmp_path / "train-00000.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8:8 + size]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size:])
    with pytest.raises(UserError, match=r"train-00000.safetensors is not a readable token shard .* run `prepare` again"):
        TokenShards(tmp_path, "train")


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 8 + b"{}",
                                     b"\x02" + bytes(7) + b"[]", (9000).to_bytes(8, "little") + b"[" * 9000])
def test_a_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train-00000.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is not a readable token shard"):
        TokenShards(tmp_path, "train")


@pytest.mark.parametrize("files", [
    None, [], {"../secret": {"size": 1, "sha256": ""}}, {"/etc/hostname": {"size": 1, "sha256": ""}}, {"": {"size": 0, "sha256": ""}},
    {"a.txt": {"size": 4.0, "sha256": ""}}, {"a.txt": {"size": 4}}, {"a.txt": 4}, {"a\x00": {"size": 4, "sha256": ""}},
    {"folder": {"size": 4096, "sha256": ""}}, {"a.txt/../../secret": {"size": 1, "sha256": ""}},
])
def test_a_manifest_that_lies(tmp_path: Path, files: Any) -> None:
    directory = tmp_path / "model"
    write_directory(directory, lambda d: (d / "a.txt").write_text("text") and {})
    assert read_manifest(directory) is not None
    (tmp_path / "secret").write_text("s")
    (directory / "folder").mkdir()
    (directory / MANIFEST).write_text(json.dumps({"files": files}))
    assert read_manifest(directory) is None and read_manifest(directory, hashes=True) is None
    (directory / MANIFEST).write_text("[" * 9000)
    assert read_manifest(directory) is None
