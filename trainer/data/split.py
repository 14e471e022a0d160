"""Which rows are held out, and which are used at all: by a hash of seed and id, so that neither depends on the rows' order.

A row keeps its side when rows are added, removed or shuffled. Another seed deals all rows anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.packing import mix
from trainer.errors import UserError

OFFICIAL_TEST_IDS = Path(__file__).parent / "official_test_ids.txt"
"""PMIDs of PubMedQA's official 500 test rows."""


def hash64(*parts: str) -> int:
    """A 64-bit hash of some texts; the same everywhere and always. Lone surrogates are allowed."""
    return int.from_bytes(hashlib.blake2b("\x00".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def order_keys(ids: Iterable[str], seed: int) -> NDArray[np.uint64]:
    """One number a row, uint64: what split and choice go by."""
    prefix = str(seed)
    return np.array([hash64(prefix, i) for i in ids], dtype=np.uint64)


def held_out(keys: NDArray[np.uint64], test_share: float) -> NDArray[np.bool_]:
    """Whether each row is held out."""
    return keys < np.uint64(int(test_share * 2**64))


def choice_threshold(keys: Sequence[NDArray[np.uint64]], count: int) -> int:
    """The largest `choice` among the `count` rows that are used: rows up to it are. Reads the arrays twice, holds no copy of all.

    The choice is independent of the split, so that a smaller dataset is split in the same shares.
    """
    bits = 16
    histogram = np.zeros(1 << bits, dtype=np.int64)
    for part in keys:
        histogram += np.bincount((choice(part) >> np.uint64(64 - bits)).astype(np.int64), minlength=1 << bits)
    if int(histogram.sum()) <= count:
        return 2**64 - 1
    border = int(np.searchsorted(np.cumsum(histogram), count))
    before = int(histogram[:border].sum())
    of_border = [c[(c >> np.uint64(64 - bits)) == np.uint64(border)] for c in map(choice, keys)]
    return int(np.sort(np.concatenate(of_border))[count - before - 1])


def choice(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What `run.data.max_rows` goes by: the rows with the smallest choice are used."""
    return mix(mix(keys))


def read_ids(path: Path) -> frozenset[str]:
    """Ids from a file, one a line; empty lines and lines that start with # are left out. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"run.data.exclude_ids: {path} cannot be read ({error}). Give a UTF-8 text file with one id a line.") from None
    return frozenset(text for line in lines if (text := line.strip()) and not text.startswith("#"))
