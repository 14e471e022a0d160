"""Token shards: rows of token ids in safetensors files, mapped into memory.

A split is `<split>-00000.safetensors`, `<split>-00001.safetensors`, …; each holds

    tokens        int32 [total]     the rows one after another
    offsets       int64 [rows + 1]  where each row starts in `tokens`
    answer_start  int32 [rows]      index within the row of the first answer token (at least 1)
    row           int64 [rows]      index of the row in the split: 0, 1, 2, … through all shards

The end-of-sequence token that closes an answer is part of the row. Nothing here needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError

_TYPES: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8"), "U8": np.dtype("u1")}


def shard_name(split: str, index: int) -> str:
    """File name of a split's shard."""
    return f"{split}-{index:05d}.safetensors"


def write_shard(path: Path, rows: Sequence[NDArray[np.int32]], answer_start: Sequence[int], first: int, max_tokens: int) -> dict[str, Any]:
    """Write rows as one shard (not synced). `first` is the split's index of the first row. Returns {file, rows, tokens, answer_tokens}."""
    lengths = np.fromiter((len(r) for r in rows), dtype=np.int64, count=len(rows))
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    tokens = np.concatenate(rows).astype(np.int32, copy=False) if len(rows) else np.zeros(0, dtype=np.int32)
    return write_arrays(path, tokens, offsets, np.asarray(answer_start, dtype=np.int32), first, max_tokens)


def write_arrays(path: Path, tokens: NDArray[np.int32], offsets: NDArray[np.int64], answer_start: NDArray[np.int32], first: int,
                 max_tokens: int) -> dict[str, Any]:
    """`write_shard` for rows that already lie one after another."""
    from safetensors.numpy import save_file

    rows = len(answer_start)
    save_file({"tokens": tokens, "offsets": offsets, "answer_start": answer_start,
               "row": np.arange(first, first + rows, dtype=np.int64)}, path, metadata={"max_tokens": str(max_tokens)})
    answer_tokens = int(np.diff(offsets).sum() - answer_start.sum(dtype=np.int64))
    return {"file": path.name, "rows": rows, "tokens": int(offsets[-1]), "answer_tokens": answer_tokens}


def map_safetensors(path: Path) -> tuple[dict[str, NDArray[Any]], Mapping[str, str]]:
    """Read-only views of a file's integer tensors, and its metadata. Pages are read on first use. Raises UserError if it is damaged.

    The layout is safetensors': a little-endian u64, that many bytes of JSON, then the data.
    """
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
        size = int.from_bytes(data[:8].tobytes(), "little")
        if size > len(data) - 8:
            raise ValueError("the file ends within its header")
        header = json.loads(data[8 : 8 + size].tobytes())
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= len(data) - 8 - size:
                raise ValueError(f"{name} lies outside the file")
            tensors[name] = data[8 + size + start : 8 + size + end].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _broken(path, error) from None
    return tensors, metadata


def _broken(path: Path, error: object) -> UserError:
    return UserError(f"{path} is not a readable token shard ({error}). Remove the dataset directory and run `prepare` again.")


class TokenShards:
    """The rows of one split, mapped into memory: opening costs no reading of tokens, and workers share the pages."""

    def __init__(self, directory: Path, split: str) -> None:
        """Opens `<directory>/<split>-*.safetensors`. Raises UserError if there are none or one is damaged."""
        paths = sorted(directory.glob(f"{split}-?????.safetensors"))
        if not paths:
            raise UserError(f"{directory} has no {split} shards. Run `python -m trainer prepare` first.")
        self._tokens: list[NDArray[np.int32]] = []
        self._offsets: list[NDArray[np.int64]] = []
        answer_start, lengths, firsts = [], [], [0]
        self.max_tokens: int = 0
        """Longest row that the dataset allows (data.max_tokens), not the longest it has."""
        for path in paths:
            tensors, metadata = map_safetensors(path)
            try:
                offsets = np.asarray(tensors["offsets"])
                longest = int(metadata["max_tokens"])
                if not (tensors["tokens"].ndim == tensors["answer_start"].ndim == 1 and offsets.shape == (len(tensors["answer_start"]) + 1,)
                        and offsets[0] == 0 and offsets[-1] == len(tensors["tokens"]) and (np.diff(offsets) >= 0).all()):
                    raise ValueError("rows and tokens do not belong together")
            except (ValueError, LookupError, TypeError, OverflowError) as error:
                raise _broken(path, error) from None
            self._tokens.append(tensors["tokens"])
            self._offsets.append(offsets)
            lengths.append(np.diff(offsets).astype(np.int32))
            answer_start.append(np.asarray(tensors["answer_start"]))
            firsts.append(firsts[-1] + len(offsets) - 1)
            self.max_tokens = max(self.max_tokens, longest)
        self._first = np.array(firsts, dtype=np.int64)
        self.lengths: NDArray[np.int32] = np.concatenate(lengths)
        """Tokens of each row, int32 [rows]."""
        self.answer_start: NDArray[np.int32] = np.concatenate(answer_start)
        """Index within each row of the first answer token, int32 [rows]."""

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, index: int) -> tuple[NDArray[np.int32], int]:
        """The row's tokens int32 [n] (a view of the mapped file) and the index of its first answer token."""
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        local = index - int(self._first[shard])
        start, end = self._offsets[shard][local : local + 2]
        return self._tokens[shard][start:end], int(self.answer_start[index])

    def loss_tokens(self, rows: Sequence[int] | NDArray[np.int64], loss_on: str = "answer") -> int:
        """Number of trained tokens in these rows: those of the answers, or all but each row's first."""
        index = np.asarray(rows, dtype=np.int64)
        starts = self.answer_start[index].sum(dtype=np.int64) if loss_on == "answer" else len(index)
        return int(self.lengths[index].sum(dtype=np.int64) - starts)

    def segments(self, budget: int) -> int:
        """Number of segments that always suffices for a micro-batch of `budget` tokens, padding included: a fixed shape.

        The bound is exact: as many of the split's shortest rows as fit. Around the end of an epoch a row may occur once for
        each epoch in one micro-batch, hence the repetition.
        """
        total = int(self.lengths.sum(dtype=np.int64))
        shortest = np.sort(self.lengths)[: budget].astype(np.int64)
        rows = int(np.searchsorted(np.cumsum(np.repeat(shortest, budget // max(total, 1) + 2)), budget, side="right"))
        return rows + -(-budget // self.max_tokens)
