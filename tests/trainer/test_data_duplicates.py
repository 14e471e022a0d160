"""Shingles, bands and similarity against plain Python."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import duplicates


def plain(text: str) -> set[tuple[bytes, ...]]:
    words = re.findall(rb"[0-9a-z\x80-\xff]+", text.lower().encode("utf-8", "surrogatepass"))
    if len(words) < 3:
        return {tuple(words)} if words else set()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text(alphabet="ab Cé.!1\n", max_size=60), max_size=6))
def test_shingles_are_those_of_plain_python(texts: list[str]) -> None:
    values, offsets = duplicates.shingles(texts)
    sets = [set(values[a:b].tolist()) for a, b in pairwise(offsets)]
    reference = [plain(text) for text in texts]
    assert [len(s) for s in sets] == [len(r) for r in reference]
    for i in range(len(texts)):
        for j in range(i):
            assert len(sets[i] & sets[j]) == len(reference[i] & reference[j])


def test_similarity_is_exact() -> None:
    words = [f"w{i}" for i in range(200)]
    left, right = " ".join(words), " ".join(words[:150])
    values, offsets = duplicates.shingles([left, right])
    a, b = plain(left), plain(right)
    assert duplicates.jaccard(values[: offsets[1]], values[offsets[1] :]) == pytest.approx(len(a & b) / len(a | b))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    rng = random.Random(1)
    found = 0
    for pair in range(60):
        words = [f"p{pair}w{i}" for i in range(300)]
        # Replacing a share of a text's end lowers the similarity to 2s / (1 + s) of what stays.
        kept = int(300 * 2 * threshold / (1 + threshold)) + 2
        other = words[:kept] + [f"x{rng.random()}" for _ in range(300 - kept)]
        values, offsets = duplicates.shingles([" ".join(words), " ".join(other)])
        keys = duplicates.band_keys(values, offsets, duplicates.bands(threshold))
        found += bool((keys[0] == keys[1]).any())
    assert found >= 59


def test_different_texts_share_no_band() -> None:
    texts = [" ".join(f"t{t}w{i}" for i in range(100)) for t in range(50)]
    keys = duplicates.band_keys(*duplicates.shingles(texts), duplicates.bands(0.8))
    assert all(len(np.unique(keys[:, band])) == 50 for band in range(keys.shape[1]))


def test_texts_without_words() -> None:
    values, offsets = duplicates.shingles(["", "...", "a"])
    assert offsets.tolist() == [0, 0, 0, 1] and duplicates.band_keys(values, offsets, 4).shape == (3, 16)
    assert duplicates.shingles([])[1].tolist() == [0]
