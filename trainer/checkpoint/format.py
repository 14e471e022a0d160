"""One rank's file of a checkpoint: the safetensors format, written from one host buffer and read through a memory map.

The format is a length (8 bytes, little endian), a JSON header and the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). It is written here and not by the safetensors package because that copies every
tensor into Python bytes first and returns no digest; a test reads these files with the package.

Keys are `<name>@<start>`: the range of the flattened tensor `name` that begins at element `start`. The header's metadata holds the
shapes of the whole tensors.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import mmap
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer.files import MAX_HEADER

warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # of memory maps, which are only read

if TYPE_CHECKING:
    from trainer.engines.base import Piece

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
"""safetensors' names of the types that occur in a training state."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

BLOCK = 16 << 20
"""Bytes hashed and written at a time."""


class BrokenCheckpoint(Exception):  # noqa: N818
    """A checkpoint's file does not hold what its header or its manifest says."""


@dataclass(frozen=True)
class Entry:
    """A range of one flattened tensor inside a file."""

    name: str
    start: int
    """First element, in the flattened whole."""
    count: int
    dtype: torch.dtype
    offset: int
    """First byte, from the end of the header."""


class Layout:
    """Where each piece of a rank lies in its file's data part, and so in the host blocks that hold it."""

    def __init__(self, pieces: Sequence[Piece], metadata: dict[str, str]) -> None:
        owned = [i for i, piece in enumerate(pieces) if piece.owned and piece.tensor.numel()]
        # Widest types first: every tensor then begins at a multiple of its own element size, as views of the buffer need.
        owned.sort(key=lambda i: (-pieces[i].tensor.element_size(), i))
        self.entries: list[tuple[int, Entry]] = []
        """(index into the pieces, place)."""
        shapes: dict[str, list[int]] = {}
        header: dict[str, object] = {}
        offset = 0
        for i in owned:
            piece = pieces[i]
            if piece.tensor.dim() != 1:
                raise ValueError(f"piece {piece.name}@{piece.start} must be 1-D, not {tuple(piece.tensor.shape)}")
            size = piece.tensor.numel() * piece.tensor.element_size()
            key = f"{piece.name}@{piece.start}"
            if key in header:
                raise ValueError(f"two pieces are called {key}")
            header[key] = {"dtype": NAMES[piece.tensor.dtype], "shape": [piece.tensor.numel()], "data_offsets": [offset, offset + size]}
            self.entries.append((i, Entry(piece.name, piece.start, piece.tensor.numel(), piece.tensor.dtype, offset)))
            shapes[piece.name] = list(piece.shape)
            offset += size
        self.size = offset
        """Bytes of the data part."""
        text = json.dumps({"__metadata__": {**metadata, "shapes": json.dumps(shapes)}, **header}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text

    def copy(self, pieces: Sequence[Piece], block: torch.Tensor, begin: int) -> None:
        """Fill `block` (uint8) with the bytes of the data part from `begin` on. From a GPU without waiting: on the current stream."""
        end = begin + block.numel()
        at = bisect.bisect_right(self.entries, begin, key=lambda e: e[1].offset) - 1
        for i, entry in self.entries[max(at, 0):]:
            if entry.offset >= end:
                break
            raw = pieces[i].tensor.detach().contiguous().view(torch.uint8)
            first, last = max(begin, entry.offset), min(end, entry.offset + raw.numel())
            if first < last:
                block[first - begin:last - begin].copy_(raw[first - entry.offset:last - entry.offset], non_blocking=True)


def write(path: Path, header: bytes, parts: Iterable[torch.Tensor]) -> tuple[int, bytes]:
    """Write header and parts (CPU, uint8, one after another) to a new file and sync it. Returns its size and sha256 digest. Raises OSError.

    A part may be used again by the iterable when the next is asked for. One thread hashes what another writes. The pages are dropped
    from the page cache afterwards: a checkpoint is read seldom, and the cache is better used for the shards.
    """
    digest = hashlib.sha256()
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="checkpoint-sha256") as hashing:
            for part in itertools.chain([memoryview(header)], (memoryview(p.numpy().data) for p in parts if p.numel())):
                size += len(part)
                for at in range(0, len(part), BLOCK):
                    block = part[at:at + BLOCK]
                    hashed = hashing.submit(digest.update, block)
                    done = 0
                    while done < len(block):
                        done += os.write(descriptor, block[done:])
                    hashed.result()
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return size, digest.digest()


class TensorFile:
    """A rank's file, memory-mapped. Raises BrokenCheckpoint if header and size do not agree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(MAX_HEADER, size - 8):
                    raise BrokenCheckpoint(f"{path}: its header's length {length} is not possible")
                header = json.loads(file.read(length))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError, RecursionError) as error:
            raise BrokenCheckpoint(f"{path}: {error}") from None
        self._data = 8 + length
        self.entries: list[Entry] = []
        try:
            metadata = header.pop("__metadata__", {})
            self.shapes: dict[str, tuple[int, ...]] = {k: tuple(map(int, v)) for k, v in json.loads(metadata.get("shapes", "{}")).items()}
            for key, value in header.items():
                name, _, start = key.rpartition("@")
                dtype, (count,), (begin, end) = DTYPES[value["dtype"]], value["shape"], value["data_offsets"]
                whole = all(type(number) is int for number in (count, begin, end))
                inside = whole and 0 <= begin <= end <= size - self._data and end - begin == count * dtype.itemsize
                if not inside or int(start) < 0 or name not in self.shapes or min(self.shapes[name], default=0) < 0:
                    raise BrokenCheckpoint(f"{path}: {key} lies outside the file")
                self.entries.append(Entry(name, int(start), count, dtype, begin))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise BrokenCheckpoint(f"{path}: its header is not a checkpoint's: {error!r}") from None

    def elements(self, entry: Entry, start: int, count: int) -> torch.Tensor:
        """`count` elements of the entry from its `start`-th on; a read-only view of the map (copy it before changing it)."""
        return torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=self._data + entry.offset + start * entry.dtype.itemsize)
