"""Reading a checkpoint at any world size: ranges of a tensor are gathered from whichever ranks' files hold them."""

from __future__ import annotations

import bisect
import math
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.format import BrokenCheckpoint, Entry, TensorFile
from trainer.files import MANIFEST, manifest_files, read_json, sha256

STATE = "state.json"


def rank_file(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


class CheckpointReader:
    """A whole checkpoint directory. Opening it checks headers, and that every tensor is covered without gap or overlap.

    Raises BrokenCheckpoint. `verify` compares the files with the manifest's digests; opening does not.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.manifest: dict[str, Any] = read_json(directory / MANIFEST)
            self.state: dict[str, Any] = read_json(directory / STATE)
            self.step = int(self.state["step"])
            files = sorted(manifest_files(self.manifest))
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise BrokenCheckpoint(f"{directory}: {error!r}") from None
        self._ranges: dict[str, list[tuple[Entry, TensorFile]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in files:
            if not name.endswith(".safetensors"):
                continue
            file = TensorFile(directory / name)
            for entry in file.entries:
                self._ranges.setdefault(entry.name, []).append((entry, file))
                if self._shapes.setdefault(entry.name, file.shapes[entry.name]) != file.shapes[entry.name]:
                    raise BrokenCheckpoint(f"{directory}: the ranks' files disagree on the shape of {entry.name}")
        for name, ranges in self._ranges.items():
            ranges.sort(key=lambda r: r[0].start)
            at = 0
            for entry, _ in ranges:
                if entry.start != at or entry.dtype != ranges[0][0].dtype:
                    raise BrokenCheckpoint(f"{directory}: {name} is not covered once at element {at}")
                at += entry.count
            if at != math.prod(self._shapes[name]):
                raise BrokenCheckpoint(f"{directory}: {name} ends at element {at} of {math.prod(self._shapes[name])}")

    def names(self) -> list[str]:
        """Names of all tensors, for example `weights/model.norm.weight`."""
        return sorted(self._ranges)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor. Raises KeyError."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Type in which the tensor is stored. Raises KeyError."""
        return self._ranges[name][0][0].dtype

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill the 1-D CPU tensor `out` from element `start` of the flattened tensor on, converted to `out`'s type.

        Threads may read at the same time. Raises KeyError (no such tensor) and IndexError (the range is not inside it).
        """
        end = start + out.numel()
        if not 0 <= start <= end <= math.prod(self._shapes[name]):
            raise IndexError(f"{name}: elements {start} to {end} of {math.prod(self._shapes[name])}")
        ranges = self._ranges[name]
        at = start
        i = bisect.bisect_right(ranges, at, key=lambda r: r[0].start) - 1
        while at < end:
            entry, file = ranges[i]
            count = min(end, entry.start + entry.count) - at
            if count > 0:
                out[at - start:at - start + count].copy_(file.elements(entry, at - entry.start, count))
                at += count
            i += 1

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor in its stored type. Raises KeyError."""
        out = torch.empty(math.prod(self._shapes[name]), dtype=self.dtype(name))
        self.read(name, 0, out)
        return out.view(self._shapes[name])

    def verify(self, share: int = 0, of: int = 1) -> str | None:
        """Compare every `of`-th file, from the `share`-th on, with its sha256 in the manifest. Returns what is wrong, or None."""
        for name in sorted(self.manifest["files"])[share::of]:
            try:
                if sha256(self.directory / name) != self.manifest["files"][name]["sha256"]:
                    return f"{name} does not have its sha256"
            except OSError as error:
                return f"{name}: {error}"
        return None
