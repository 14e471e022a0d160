"""Near duplicates between the training split and the held-out rows.

Rows are compared by the Jaccard similarity of their word shingles (three words in a row, lower case, without punctuation). MinHash
signatures in bands find the pairs worth comparing (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets",
chapter 3); the similarity itself is then computed exactly. The bands are chosen so that a pair right at the threshold is found
with a probability of at least 99.9%.

Everything works on arrays of many rows; no loop runs over words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.data.packing import mix

SHINGLE = 3
HASHES = 64
RECALL = 0.999

# Odd multipliers and offsets of 64 multiply-shift hash functions (Dietzfelbinger), from mix() so that they never change.
_MULTIPLY = mix(np.arange(HASHES, dtype=np.uint64)) | np.uint64(1)
_ADD = mix(np.arange(HASHES, 2 * HASHES, dtype=np.uint64))

_BASE = np.uint64(0x5851F42D4C957F2D)
_INVERSE = np.uint64(pow(0x5851F42D4C957F2D, -1, 1 << 64))
_WORD = np.zeros(256, dtype=bool)
_WORD[[*range(ord("0"), ord("9") + 1), *range(ord("a"), ord("z") + 1), *range(128, 256)]] = True


def bands(threshold: float) -> int:
    """Hash values a band, as many as keep the recall at the threshold."""
    return max(rows for rows in range(1, 17) if rows == 1 or 1 - (1 - threshold**rows) ** (HASHES // rows) >= RECALL)


def shingles(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Hashes of each text's word shingles, ascending and once each; uint32 [total] and int64 [texts + 1] where each text starts.

    A text of fewer than three words has one shingle of all of them.
    """
    encoded = [text.lower().encode("utf-8", "surrogatepass") + b" " for text in texts]
    data = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    ends = np.cumsum([len(e) for e in encoded]) if encoded else np.zeros(0, dtype=np.int64)
    inside = _WORD[data]
    # Each text ends with a blank, so no word crosses texts.
    edges = np.diff(np.concatenate([[0], inside.view(np.int8), [0]]))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    with np.errstate(over="ignore"):
        # A word's hash is sum(byte * BASE^i) over it, taken from running sums and shifted back to its start.
        powers = np.cumprod(np.full(len(data), _BASE, dtype=np.uint64))
        sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum((data.astype(np.uint64) + np.uint64(1)) * powers, dtype=np.uint64)])
        inverses = np.cumprod(np.full(len(data), _INVERSE, dtype=np.uint64))
        words = mix((sums[stops] - sums[starts]) * inverses[starts]) if len(starts) else np.zeros(0, dtype=np.uint64)
        first = np.searchsorted(starts, np.concatenate([[0], ends[:-1]])) if len(ends) else np.zeros(0, dtype=np.int64)
        counts = np.diff(np.concatenate([first, [len(words)]]))
        index = np.arange(len(words))
        text_of = np.repeat(np.arange(len(texts)), counts)
        last = (first + counts - 1)[text_of] if len(words) else index
        rolled = words.copy()
        for step in range(1, SHINGLE):
            following = np.minimum(index + step, last)
            rolled = mix(rolled) + np.where(index + step <= last, words[following], np.uint64(0)) if len(words) else rolled
    keep = (index + SHINGLE - 1 <= last) | (index == first[text_of]) & (counts[text_of] < SHINGLE) if len(words) else index == 0
    key = (text_of[keep].astype(np.uint64) << np.uint64(32)) | (mix(rolled[keep]) >> np.uint64(32))
    key.sort()
    key = key[np.concatenate([[True], key[1:] != key[:-1]])] if len(key) else key
    offsets = np.searchsorted(key, np.arange(len(texts) + 1, dtype=np.uint64) << np.uint64(32)).astype(np.int64)
    return (key & np.uint64(0xFFFFFFFF)).astype(np.uint32), offsets


def band_keys(values: NDArray[np.uint32], offsets: NDArray[np.int64], rows_per_band: int) -> NDArray[np.uint32]:
    """LSH keys of each text, uint32 [texts, bands]: texts that share a key in the same band may be alike."""
    texts = len(offsets) - 1
    number = HASHES // rows_per_band
    signature = np.full((number * rows_per_band, texts), 0xFFFFFFFF, dtype=np.uint32)
    filled = np.flatnonzero(np.diff(offsets) > 0)
    if len(filled):
        wide = values.astype(np.uint64)
        starts = offsets[filled]
        hashed = np.empty(len(wide), dtype=np.uint64)
        with np.errstate(over="ignore"):
            for i in range(len(signature)):
                np.multiply(wide, _MULTIPLY[i], out=hashed)
                np.add(hashed, _ADD[i], out=hashed)
                np.right_shift(hashed, np.uint64(32), out=hashed)
                signature[i, filled] = np.minimum.reduceat(hashed, starts)
    keys = np.zeros((texts, number), dtype=np.uint64)
    for row in range(rows_per_band):
        keys = mix(keys ^ signature[row::rows_per_band].T.astype(np.uint64))
    return (keys >> np.uint64(32)).astype(np.uint32)


def jaccard(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> float:
    """Similarity of two sets, each ascending; two empty sets are alike."""
    if len(left) == 0 and len(right) == 0:
        return 1.0
    common = len(np.intersect1d(left, right, assume_unique=True))
    return common / (len(left) + len(right) - common)
