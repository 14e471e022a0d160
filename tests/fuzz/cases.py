"""How many cases, and JSON values and bytes that were tampered with: what the fuzz tests share.

Within `make test-fast` each test runs some hundred cases, the same ones every time. `make fuzz` runs 10,000 of each (CASES=n: another
number), other ones every time; a failure prints what repeats it. What was found once is a test of its own, with its value written out.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("FUZZ_CASES") or 0)
"""Cases of each test; 0: the test's own small number."""


def cases(few: int, of_many: float = 1.0) -> Callable[[Any], Any]:
    """Settings of a test: `few` cases in the fast suite, else `CASES` times `of_many` (for what takes long)."""
    many = max(few, math.ceil(CASES * of_many)) if CASES else few
    return settings(max_examples=many, deadline=None, derandomize=not CASES, database=None, print_blob=True,
                    suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate, Phase.shrink])


NUMBERS = st.one_of(
    st.integers(-3, 70), st.sampled_from([2**31 - 1, 2**31, 2**53, 2**63, 2**64, -2**63, 10**400, 1 << 20]), st.integers(),
    st.floats(), st.sampled_from([0.0, -0.0, 1e-5, 5e-324, 1e308, 0.999999999, math.inf, -math.inf, math.nan]))
TEXTS = st.one_of(
    st.text(max_size=20), st.sampled_from([
        "", " ", "\n", "a\n", "\x00", "../..", "/etc/passwd", "a/../b", "1e-5", "nan", "inf", "-1", "0x10", "true", "null", "~", "=",
        "{}", "[]", "{{ 7 }}",
        "${HOME}", "$(id)", "`id`", "%n", "x" * 300, "é", "\u202e", "\ud800", "<script>", "'\"", "2001-99-99", "1_000", "9" * 50]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
                    max_leaves=12)
"""Any JSON value, and numbers and texts that have broken programs before."""


def message(error: BaseException) -> str:
    """A named error's text, which must be one that a person can read."""
    text = str(error)
    assert 10 < len(text) < 5000 and text.encode(), text[:300]
    return text


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a document, itself (the empty path) first."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The document with another value at a path."""
    if not path:
        return new
    made = copy.copy(value)
    made[path[0]] = put(value[path[0]], path[1:], new)
    return made


@st.composite
def changed(draw: st.DrawFn, documents: Any, most: int = 3, value: Any = JSON) -> Any:
    """A document (drawn from a strategy) with up to `most` values replaced, removed, or fields added."""
    document = draw(documents)
    for _ in range(draw(st.integers(0, most))):
        path = draw(st.sampled_from(list(places(document))))
        inner = document
        for key in path:
            inner = inner[key]
        if isinstance(inner, dict) and draw(st.booleans()):
            document = put(document, path, {**inner, draw(TEXTS): draw(value)})
        elif path and draw(st.integers(0, 3)) == 0:
            parent = document
            for key in path[:-1]:
                parent = parent[key]
            document = put(document, path[:-1], [v for i, v in enumerate(parent) if i != path[-1]] if isinstance(parent, list)
                           else {k: v for k, v in parent.items() if k != path[-1]})
        else:
            document = put(document, path, draw(value))
    return document


@st.composite
def damaged(draw: st.DrawFn, contents: Any, most: int = 4) -> bytes:
    """Bytes (drawn from a strategy) in up to `most` places flipped, overwritten, removed, repeated, put in or cut off."""
    data = bytearray(draw(contents))
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.one_of(st.integers(1, 8), st.integers(1, 300)))
        kind = draw(st.sampled_from(("flip", "overwrite", "remove", "repeat", "insert", "cut", "zero")))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "overwrite":
            new = draw(st.binary(min_size=1, max_size=8))
            data[at:at + len(new)] = new
        elif kind == "remove":
            del data[at:at + length]
        elif kind == "repeat":
            data[at:at] = data[at:at + length]
        elif kind == "insert":
            data[at:at] = draw(st.one_of(st.binary(max_size=16), st.sampled_from(
                [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\\", b"{", b"[" * 2000, b'{"a":' * 2000, b"\r\n", b",", b"NaN", b"1e999",
                 b"\\ud800", b"9" * 5000])))
        elif kind == "cut":
            del data[at:]
        else:
            data[at:at + length] = bytes(len(data[at:at + length]))
    return bytes(data)
