"""The base model's files, so that a run notices when they change under it.

`<run>/inputs.json` holds a digest of each file that the run reads from `run.model.path`, written when the run begins, and compared when
it goes on and before the base model is evaluated. A hub model needs none of this: its revision is a commit.

Files up to 64 MiB (configuration, tokenizer) are digested whole. Of larger ones (weights: up to 140 GB, that a start must not read
twice) the digest takes the size, the whole safetensors header, and 64 blocks spread evenly from the first byte to the last, some
10 MiB in all. That finds every exchange, update, other conversion or cut of a model; it does not find one changed byte between two
blocks, as a failing disk or somebody who knows the places could write. Times of change are left out: a copy or a restored backup has
others.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from trainer.config import Config
from trainer.errors import UserError
from trainer.files import MAX_HEADER, read_json, sha256, write_json
from trainer.paths import RunPaths

WHOLE = 64 << 20
BLOCKS, BLOCK = 64, 128 << 10
NAMES = ("*.json", "*.jinja", "tokenizer.model", "*.txt")


def files(config: Config) -> dict[str, Path]:
    """The base model's files on the shared storage that the run reads, by name; none for a hub model."""
    model = config.run.model
    directory = config.storage_path / model.path
    if not model.path or not directory.is_dir():
        return {}
    weights = () if model.architecture else (model.gguf_file,) if model.gguf_file else ("*.safetensors",)
    found = [path for pattern in (*NAMES, *weights) for path in directory.glob(pattern) if path.is_file()]
    return {path.relative_to(directory).as_posix(): path for path in found}


def digest(path: Path) -> str:
    """Hex digest of a file: of its whole content up to 64 MiB, else of its size, header and 64 blocks. Raises OSError."""
    size = path.stat().st_size
    if size <= WHOLE:
        return sha256(path)
    made = hashlib.sha256(str(size).encode())
    descriptor = os.open(path, os.O_RDONLY)
    try:
        header = min(int.from_bytes(os.pread(descriptor, 8, 0), "little"), MAX_HEADER) if path.suffix == ".safetensors" else 0
        ranges = [(0, 8 + header), *((i * (size - BLOCK) // (BLOCKS - 1), BLOCK) for i in range(BLOCKS))]
        for start, length in ranges:
            while length > 0 and (part := os.pread(descriptor, min(length, 1 << 22), start)):
                made.update(part)
                start, length = start + len(part), length - len(part)
    finally:
        os.close(descriptor)
    return f"sampled-{made.hexdigest()}"


def check(config: Config, paths: RunPaths) -> None:
    """Record the base model's files at the run's beginning; later compare. Raises UserError that names the files that differ."""
    try:
        now = {name: digest(path) for name, path in sorted(files(config).items())}
    except OSError as error:
        raise UserError(f"run.model.path: {error.filename or config.run.model.path} cannot be read ({error.strerror}).") from None
    try:
        known = read_json(paths.inputs)["base_model"]
        differ = [f"{name} ({'is gone' if name not in now else 'is new' if name not in known else 'has other content'})"
                  for name in sorted({*known, *now}) if known.get(name) != now.get(name)]
    except FileNotFoundError:
        if now:
            paths.root.mkdir(parents=True, exist_ok=True)
            write_json(paths.inputs, {"base_model": now})
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{paths.inputs} is not readable ({error}). "
                        "Remove it if the base model is still that of the run's beginning.") from None
    if differ:
        directory = config.storage_path / config.run.model.path
        raise UserError(f"The base model in {directory} is not the one that this run began with: {', '.join(differ)}. Put the files "
                        f"back, or give the run another name (run.name) to train from the new ones. What the run had is in {paths.inputs}.")
