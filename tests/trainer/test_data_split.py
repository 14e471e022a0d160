"""The split and the choice of rows depend on id and seed alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from trainer.data import split
from trainer.errors import UserError

IDS = [f"id-{i}" for i in range(5000)]


def test_share_and_stability_under_order() -> None:
    out = split.held_out(split.order_keys(IDS, 17), 0.2)
    assert abs(out.mean() - 0.2) < 0.02
    shuffled = IDS[:]
    random.Random(0).shuffle(shuffled)
    again = split.held_out(split.order_keys(shuffled, 17), 0.2)
    assert {i for i, o in zip(IDS, out, strict=True) if o} == {i for i, o in zip(shuffled, again, strict=True) if o}


def test_another_seed_is_another_split() -> None:
    one, two = (split.held_out(split.order_keys(IDS, seed), 0.5) for seed in (1, 2))
    assert 0.4 < (one == two).mean() < 0.6


def test_hashes_are_fixed_for_all_time() -> None:
    assert split.hash64("17", "21645374") == 0x7D681C82CB05D6FE
    assert split.hash64("a", "b") != split.hash64("ab") != split.hash64("a\x00b", "")


@pytest.mark.parametrize("count", [1, 7, 1000, 4999, 5000, 9000])
def test_choice_takes_exactly_so_many_and_independent_of_the_split(count: int) -> None:
    keys = split.order_keys(IDS, 17)
    threshold = np.uint64(split.choice_threshold([keys[:1234], keys[1234:]], count))
    chosen = split.choice(keys) <= threshold
    assert chosen.sum() == min(count, 5000)
    if count >= 1000:
        assert abs(split.held_out(keys[chosen], 0.2).mean() - 0.2) < 0.05


def test_official_ids() -> None:
    ids = split.read_ids(split.OFFICIAL_TEST_IDS)
    assert len(ids) == 500 and "12377809" in ids and all(i.isdigit() for i in ids)


def test_ids_file(tmp_path: Path) -> None:
    path = tmp_path / "ids"
    path.write_bytes("\ufeff# note\n 12 \n\nab c\n".encode())
    assert split.read_ids(path) == {"12", "ab c"}
    path.write_bytes(b"\xff\xfe1")
    with pytest.raises(UserError, match="exclude_ids"):
        split.read_ids(path)
    with pytest.raises(UserError, match="exclude_ids"):
        split.read_ids(tmp_path / "none")
