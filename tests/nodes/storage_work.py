"""Data on the storage as a run has them, by the trainer's own code, without torch. Runs in the guest (tests/nodes/test_nfs.py):

    python -m tests.nodes.storage_work shards /mnt/nfs/run
    python -m tests.nodes.storage_work read /mnt/nfs/run/file

Prints one JSON object a line, as things happen. Another user's id is taken after the imports: that user need not see this checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.shards import TokenShards, shard_name, write_shard
from trainer.files import read_manifest, write_directory
from trainer.sitecheck import storage

ROWS, ROWS_A_SHARD = 4000, 1000


def say(**values: Any) -> None:
    print(json.dumps({**values, "at": time.time()}), flush=True)


def _rows() -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    return [generator.integers(0, 32000, int(generator.integers(64, 512)), dtype=np.int32) for _ in range(ROWS)]


def shards(directory: Path) -> None:
    """A dataset's directory, written as `prepare` does it and read as the loader does it: through memory maps, in any order."""
    rows, dataset = _rows(), directory / "dataset"

    def fill(folder: Path) -> dict[str, Any]:
        parts = [write_shard(folder / shard_name("train", index), rows[at:at + ROWS_A_SHARD], [1] * ROWS_A_SHARD, at, 512)
                 for index, at in enumerate(range(0, ROWS, ROWS_A_SHARD))]
        return {"shards": parts}

    begin = time.perf_counter()
    write_directory(dataset, fill)
    written = time.perf_counter() - begin
    mapped = TokenShards(dataset, "train")
    order = np.random.default_rng(6).permutation(ROWS)
    begin = time.perf_counter()
    right = all(np.array_equal(mapped.row(int(index))[0], rows[index]) for index in order)
    say(right=right, manifest=read_manifest(dataset, hashes=True) is not None, write_s=written, read_s=time.perf_counter() - begin)


def read(path: Path) -> None:
    """A large file of the site check, from its start to its end; a line before and after."""
    say(begins=path.name)
    say(**storage.read(path.parent, path.name))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("shards", "read"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--uid", type=int, default=1000)
    options = parser.parse_args()
    os.setgroups([])
    os.setgid(options.uid)
    os.setuid(options.uid)
    os.umask(0o022)
    {"shards": shards, "read": read}[options.command](options.path)


if __name__ == "__main__":
    main()
