"""Prepare a dataset: rows in, token shards, held-out texts and a manifest out.

Chunks of the source are tokenised by several processes into parts (trainer/data/parts.py), which a restart uses again. Then, over
the parts' small arrays: duplicates are found, rows are chosen, the split is made, near duplicates of held-out rows leave the training
split, and the kept rows are copied into shards. No step holds more of the dataset than a part or a bucket of hashes, beside some
tens of bytes a row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.config import Config
from trainer.data import duplicates, parts, split
from trainer.data.formats import template
from trainer.data.parts import NOT_COUNTED, PartInfo, Settings
from trainer.data.readers import Source, open_source
from trainer.data.shards import shard_name, write_arrays
from trainer.errors import UserError
from trainer.files import read_manifest, sha256, write_atomic, write_directory
from trainer.model.tokenizer import load_tokenizer, save_rust, tokenizer_sha256, with_format
from trainer.paths import RunPaths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SHARD_TOKENS = 8 << 20
BUCKET_ROWS = 1 << 18
"""Rows whose hashes are compared at a time: some 20 MB."""
POOL_BYTES = 16 << 20
"""Smaller sources are prepared in this process: starting others would take longer."""
REJECT_SAMPLES = 20
"""Rejected rows of each reason in rejects.jsonl."""
VERSION = 1
"""Of the parts' form: others are not used again."""

DUPLICATE_ROW, DUPLICATE_ID, NEAR, NOT_CHOSEN = "duplicate row", "duplicate id", "near duplicate of a held-out row", "over max_rows"

Progress = Callable[[float, str], None]
"""Called with the share done (0 to 1) and a message."""


def prepare(config: Config, tokenizer: PreTrainedTokenizerBase | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Make `<run>/dataset` if it is not there and whole; returns its manifest.

    Raises UserError if the source cannot be read, has changed since, has no usable row, or too many rows are rejected.
    """
    paths = RunPaths.of(config)
    if (manifest := read_manifest(paths.dataset)) is not None:
        _check_unchanged(config, paths, manifest)
        return manifest
    started = time.monotonic()
    report = progress or (lambda share, message: None)
    data = config.run.data
    tokenizer = with_format(tokenizer, data.format) if tokenizer is not None else load_tokenizer(config)
    source = open_source(data, config.storage_path)
    files, before = _inputs(config, source), _times(source)
    inputs = _digest(source, files)
    digest = tokenizer_sha256(tokenizer)
    settings = _settings(config, tokenizer, source)
    key = hashlib.sha256(json.dumps([VERSION, inputs, digest, asdict(settings)], default=sorted).encode()).hexdigest()[:16]
    work = paths.root / f".dataset-parts-{key}"
    for other in paths.root.glob(".dataset-parts-*"):
        if other != work:  # of another configuration under the same name
            shutil.rmtree(other, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    save_rust(tokenizer, work / "tokenizer.json")
    settings = replace(settings, directory=str(work), tokenizer_file=str(work / "tokenizer.json"))

    infos = _make_parts(source, settings, _processes(config, source), report)
    rejects = paths.root / "dataset-rejects.jsonl"
    _check_rejected(infos, data.max_rejected, source, rejects)
    chosen = _Choice(work, infos, settings)
    chosen.choose(data.max_rows)
    if _times(source) != before:
        raise UserError(f"run.data: {source.name} was changed while it was read. Run `prepare` again when it is complete.")
    report(0.9, "writing shards")
    manifest = write_directory(paths.dataset, lambda directory: {
        **_write(directory, chosen, infos),
        "format": data.format, "max_tokens": data.max_tokens, "loss_on": data.loss_on, "end": settings.template.end,
        "tokenizer_sha256": digest, "special_tokens": list(_saved(tokenizer, directory)),
        "source": {"name": source.name, "revision": data.revision, "subsets": list(data.subsets), "bytes": source.size},
        "inputs": files, "inputs_sha256": inputs, "seconds": round(time.monotonic() - started, 3),
    })
    rejects.unlink(missing_ok=True)
    shutil.rmtree(work)
    report(1.0, "dataset ready")
    return manifest


def _settings(config: Config, tokenizer: PreTrainedTokenizerBase, source: Source) -> Settings:
    data = config.run.data
    excluded = split.read_ids(config.storage_path / data.exclude_ids) if data.exclude_ids else frozenset()
    official = split.read_ids(split.OFFICIAL_TEST_IDS) if source.official and not data.keep_official_test else frozenset()
    special = tuple(sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special))
    return Settings(directory="", tokenizer_file="", template=template(data.format, tokenizer), special_ids=special,
                    columns=dict(source.columns), context=data.context or data.format == "tags-context", decision=data.decision,
                    max_tokens=data.max_tokens, test_share=data.test_share, seed=config.run.seed,
                    near_duplicates=data.near_duplicates, excluded=excluded, official=official)


def _inputs(config: Config, source: Source) -> dict[str, str]:
    """sha256 of each input file, by its path on the storage (elsewhere: its name)."""
    paths = [*source.files, *source.arrow, *([config.storage_path / config.run.data.exclude_ids] if config.run.data.exclude_ids else [])]
    root = config.storage_path
    return {path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name: sha256(path) for path in paths if path.is_file()}


def _digest(source: Source, files: dict[str, str]) -> str:
    """Digest of the input files' names and contents."""
    return hashlib.sha256(json.dumps([source.name, sorted(files.items())]).encode()).hexdigest()


def _times(source: Source) -> list[tuple[int, int]]:
    """Size and time of change of each file."""
    return [(s.st_size, s.st_mtime_ns) for s in (path.stat() for path in (*source.files, *source.arrow))]


def _check_unchanged(config: Config, paths: RunPaths, manifest: dict[str, Any]) -> None:
    """UserError if the dataset on the storage is not the one that was prepared. A hub dataset is pinned by its commit."""
    known = manifest.get("inputs")
    if not config.run.data.path or not isinstance(known, dict):
        return
    try:
        now = _inputs(config, open_source(config.run.data, config.storage_path))
    except UserError as error:
        log.warning("The dataset that this run was prepared from is gone; the run goes on with what it prepared. %s", error)
        return
    if differ := sorted(name for name in {*known, *now} if known.get(name) != now.get(name)):
        raise UserError(f"run.data: the dataset has changed since this run prepared it: {', '.join(differ)}. Put the files back, or give "
                        f"the run another name (run.name) to use the new ones. What the run had is in {paths.dataset / 'manifest.json'}.")


def _saved(tokenizer: PreTrainedTokenizerBase, directory: Path) -> list[str]:
    tokenizer.save_pretrained(directory / "tokenizer")
    return sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def _processes(config: Config, source: Source) -> int:
    return max(1, math.floor(config.resources.prepare_cpus)) if source.size >= POOL_BYTES else 1


# --- parts ------------------------------------------------------------------------------------------------------------------------

def _make_parts(source: Source, settings: Settings, processes: int, report: Progress) -> list[PartInfo]:
    """Make the parts that are not there yet; all parts in order."""
    infos: list[PartInfo] = []
    size, started, rows = source.size, time.monotonic(), 0
    for info in _in_order(source, settings, processes):
        infos.append(info)
        rows += info.rows_read
        if rows >= 1000 and rows == sum(sum(i.rejected.values()) for i in infos) and not any(
                reason in i.rejected for i in infos for reason in NOT_COUNTED):
            break  # not one usable row so far: more of them would not help
        speed = rows / max(1e-3, time.monotonic() - started)
        written = sum(sum(i.sizes.values()) for i in infos)
        report(min(0.89, 0.9 * written / max(1, written + size)), f"{rows} rows read, {speed:.0f} rows/s")
    return infos


def _in_order(source: Source, settings: Settings, processes: int) -> Iterator[PartInfo]:
    directory = Path(settings.directory)
    if processes == 1:
        before = os.environ.get("TOKENIZERS_PARALLELISM")
        parts.start_worker(settings)
        try:
            for index, chunk in enumerate(source.chunks()):
                yield parts.finished(directory, index) or parts.make_part(index, chunk)
        finally:
            if before is None:
                os.environ.pop("TOKENIZERS_PARALLELISM", None)
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = before
        return
    waiting: deque[PartInfo | Future[PartInfo]] = deque()
    # Not forked: the tokenizer and Arrow have threads of their own.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), parts.start_worker, (settings,)) as pool:
        try:
            for index, chunk in enumerate(source.chunks()):
                waiting.append(parts.finished(directory, index) or pool.submit(parts.make_part, index, chunk))
                while len(waiting) > 3 * processes:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        except BrokenProcessPool:
            raise UserError("A preparation process was killed, most likely for memory. Finished parts are kept: run `prepare` again, "
                            "with fewer resources.prepare_cpus or more memory.") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _result(item: PartInfo | Future[PartInfo]) -> PartInfo:
    return item.result() if isinstance(item, Future) else item


def _check_rejected(infos: list[PartInfo], most: float, source: Source, rejects: Path) -> None:
    read = sum(info.rows_read for info in infos)
    counts = _rejected(infos)
    bad = {reason: n for reason, n in counts.items() if reason not in NOT_COUNTED}
    if read == 0:
        raise UserError(f"{source.name} has no rows.")
    share = sum(bad.values()) / read
    if share > most or not any(info.rows for info in infos):
        write_atomic(rejects, _lines(_samples(infos)))
        reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted((bad or counts).items(), key=lambda item: -item[1]))
        limit = f"more than run.data.max_rejected ({most:.2%})" if share > most else "so that none is left"
        raise UserError(f"{sum((bad or counts).values())} of {read} rows of {source.name} were rejected, {limit}: {reasons}. "
                        f"Examples are in {rejects}. Correct the rows, set run.data.columns or run.data.max_tokens, or raise the limit.")


def _rejected(infos: list[PartInfo]) -> Counter[str]:
    counts = Counter[str]()
    for info in infos:
        counts.update(info.rejected)
    return counts


def _samples(infos: list[PartInfo]) -> list[dict[str, str]]:
    taken = Counter[str]()
    samples = []
    for info in infos:
        for sample in info.samples:
            taken[sample["reason"]] += 1
            if taken[sample["reason"]] <= REJECT_SAMPLES:
                samples.append(sample)
    return samples


def _lines(objects: list[dict[str, str]]) -> str:
    return "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects)


# --- which rows -------------------------------------------------------------------------------------------------------------------

class _Choice:
    """Which row of which part goes where: one byte a row."""

    DROPPED, TRAIN, TEST = 0, 1, 2

    def __init__(self, work: Path, infos: list[PartInfo], settings: Settings) -> None:
        self.work, self.settings = work, settings
        self.first = np.concatenate([[0], np.cumsum([info.rows for info in infos])]).astype(np.int64)
        """Index of each part's first row among all rows of the parts."""
        self.target = np.zeros(int(self.first[-1]), dtype=np.uint8)
        self.rejected = Counter[str]()
        self.samples: list[dict[str, str]] = []

        self.arrays = lru_cache(maxsize=128)(partial(parts.arrays_of, work))
        """A part's arrays. Each open one keeps a file descriptor, so not all stay open."""

    def all_parts(self) -> Iterator[tuple[int, NDArray[np.int64], dict[str, NDArray[Any]]]]:
        """Index, row numbers (among all rows) and arrays of each part that has rows."""
        for part in range(len(self.first) - 1):
            if self.first[part + 1] > self.first[part]:
                yield part, np.arange(self.first[part], self.first[part + 1]), self.arrays(part)

    def id_of(self, row: int) -> str:
        part = int(np.searchsorted(self.first, row, side="right")) - 1
        arrays = self.arrays(part)
        start, end = arrays["id_offsets"][row - self.first[part] :][:2]
        return arrays["ids"][start:end].tobytes().decode("utf-8")

    def drop(self, rows: NDArray[np.int64], reason: str, instead: NDArray[np.int64] | None = None) -> None:
        """Leave rows out. `instead`: for each the row that stays, for the samples."""
        self.target[rows] = self.DROPPED
        self.rejected[reason] += len(rows)
        have = sum(sample["reason"] == reason for sample in self.samples)
        for i, row in enumerate(rows[: max(0, REJECT_SAMPLES - have)]):
            sample = {"reason": reason, "where": f"id {self.id_of(int(row))}"}
            if instead is not None:
                sample["snippet"] = f"kept: id {self.id_of(int(instead[i]))}"
            self.samples.append(sample)

    def choose(self, max_rows: int) -> None:
        """Duplicates, number of rows, split, near duplicates."""
        self.target[:] = self.TRAIN
        # Of equal rows the one stays that the split's hash puts first; of rows with the same id the one with the smaller content
        # hash: neither depends on the order of the rows.
        self._drop_equal("content_hash", "order", DUPLICATE_ROW)
        self._drop_equal("id_hash", "content_hash", DUPLICATE_ID)
        if max_rows:
            self._limit(max_rows)
        for _, rows, arrays in self.all_parts():
            held_out = (arrays["held_out"] == 1) & (self.target[rows] == self.TRAIN)
            self.target[rows[held_out]] = self.TEST
        if self.settings.near_duplicates < 1:
            self._drop_near()
        for value, name in ((self.TRAIN, "training"), (self.TEST, "held-out")):
            if not (self.target == value).any():
                raise UserError(f"The {name} split has no rows ({int((self.target > 0).sum())} usable rows, run.data.test_share "
                                f"{self.settings.test_share}). Give more rows, or another run.data.test_share or run.seed.")

    def _drop_equal(self, same: str, rank: str, reason: str) -> None:
        buckets = max(1, -(-len(self.target) // BUCKET_ROWS))
        for bucket in range(buckets):
            keys, ranks, numbers = [], [], []
            for _, rows, arrays in self.all_parts():
                of_bucket = (self.target[rows] != self.DROPPED) & (arrays[same] % np.uint64(buckets) == bucket)
                keys.append(arrays[same][of_bucket])
                ranks.append(arrays[rank][of_bucket])
                numbers.append(rows[of_bucket])
            if not keys:
                continue
            key, ranking, number = (np.concatenate(x) for x in (keys, ranks, numbers))
            order = np.lexsort((number, ranking, key))
            key, number = key[order], number[order]
            again = np.concatenate([[False], key[1:] == key[:-1]])
            if again.any():
                kept = number[np.maximum.accumulate(np.where(again, 0, np.arange(len(key))))]
                self.drop(number[again], reason, kept[again])

    def _limit(self, max_rows: int) -> None:
        keys = [arrays["order"][self.target[rows] != self.DROPPED] for _, rows, arrays in self.all_parts()]
        threshold = np.uint64(split.choice_threshold(keys, max_rows))
        for _, rows, arrays in self.all_parts():
            over = (self.target[rows] != self.DROPPED) & (split.choice(arrays["order"]) > threshold)
            self.target[rows[over]] = self.DROPPED
            self.rejected[NOT_CHOSEN] += int(over.sum())

    def _drop_near(self) -> None:
        """Training rows that are near duplicates of a held-out row: candidates by bands, then the exact similarity."""
        number = next((arrays["bands"].shape[1] for _, _, arrays in self.all_parts()), 0)
        test_rows = int((self.target == self.TEST).sum())
        buckets = max(1, -(-test_rows // BUCKET_ROWS))
        for band in range(number):
            for bucket in range(buckets):
                held = [(arrays["bands"][:, band], rows) for _, rows, arrays in self.all_parts()]
                keys, numbers = [], []
                for key, rows in held:
                    of_bucket = (self.target[rows] == self.TEST) & (key % np.uint32(buckets) == bucket)
                    keys.append(key[of_bucket])
                    numbers.append(rows[of_bucket])
                key, test = np.concatenate(keys), np.concatenate(numbers)
                order = np.argsort(key, kind="stable")
                self._compare(band, key[order], test[order])

    def _compare(self, band: int, key: NDArray[np.uint32], test: NDArray[np.int64]) -> None:
        for part, rows, arrays in self.all_parts():
            train = np.flatnonzero(self.target[rows] == self.TRAIN)
            mine = arrays["bands"][train, band]
            start, stop = np.searchsorted(key, mine, side="left"), np.searchsorted(key, mine, side="right")
            near, of = [], []
            for i in np.flatnonzero(stop > start):
                own = self._shingles(part, int(train[i]), arrays)
                for candidate in test[start[i] : stop[i]]:
                    if duplicates.jaccard(own, self._shingles_of(int(candidate))) >= self.settings.near_duplicates:
                        near.append(rows[train[i]])
                        of.append(candidate)
                        break
            if near:
                self.drop(np.array(near), NEAR, np.array(of))

    def _shingles(self, part: int, local: int, arrays: dict[str, NDArray[Any]]) -> NDArray[np.uint32]:
        start, end = arrays["shingle_offsets"][local : local + 2]
        return arrays["shingles"][start:end]

    def _shingles_of(self, row: int) -> NDArray[np.uint32]:
        part = int(np.searchsorted(self.first, row, side="right")) - 1
        return self._shingles(part, row - int(self.first[part]), self.arrays(part))


# --- writing ----------------------------------------------------------------------------------------------------------------------

class _Shards:
    """Writes one split's shards from pieces of parts."""

    def __init__(self, directory: Path, name: str, max_tokens: int) -> None:
        self.directory, self.name, self.max_tokens = directory, name, max_tokens
        self.tokens: list[NDArray[np.int32]] = []
        self.lengths: list[NDArray[np.int64]] = []
        self.answer_start: list[NDArray[np.int32]] = []
        self.waiting = 0
        self.done: list[dict[str, Any]] = []

    def add(self, arrays: dict[str, NDArray[Any]], keep: NDArray[np.bool_]) -> None:
        """Take the rows of a part for which `keep` is true."""
        lengths = np.diff(arrays["offsets"])
        self.tokens.append(arrays["tokens"][np.repeat(keep, lengths)])
        self.lengths.append(lengths[keep])
        self.answer_start.append(arrays["answer_start"][keep])
        self.waiting += len(self.tokens[-1])
        if self.waiting >= SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self.waiting:
            return
        lengths = np.concatenate(self.lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        first = sum(shard["rows"] for shard in self.done)
        path = self.directory / shard_name(self.name, len(self.done))
        self.done.append(write_arrays(path, np.concatenate(self.tokens), offsets, np.concatenate(self.answer_start), first,
                                      self.max_tokens))
        self.tokens, self.lengths, self.answer_start, self.waiting = [], [], [], 0

    def summary(self) -> dict[str, Any]:
        """The split's part of the manifest."""
        return {**{k: sum(shard[k] for shard in self.done) for k in ("rows", "tokens", "answer_tokens")}, "shards": self.done}


def _write(directory: Path, choice: _Choice, infos: list[PartInfo]) -> dict[str, Any]:
    max_tokens = choice.settings.max_tokens
    train, test = _Shards(directory, "train", max_tokens), _Shards(directory, "test", max_tokens)
    with open(directory / "test.jsonl", "wb") as texts:
        for part, rows, arrays in choice.all_parts():
            target = choice.target[rows]
            train.add(arrays, target == choice.TRAIN)
            test.add(arrays, target == choice.TEST)
            held_out = target[arrays["held_out"] == 1] == choice.TEST
            with open(parts.names(choice.work, part)[1], "rb") as lines:
                texts.writelines(line for line, keep in zip(lines, held_out, strict=True) if keep)
    train.flush()
    test.flush()
    write_atomic(directory / "rejects.jsonl", _lines(_samples(infos) + choice.samples))
    splits = {"train": train.summary(), "test": test.summary()}
    return {"rows_read": sum(info.rows_read for info in infos), "rows_kept": sum(s["rows"] for s in splits.values()),
            "rejected": dict(sorted((_rejected(infos) + choice.rejected).items())),
            "shortened": sum(info.shortened for info in infos), "context_dropped": sum(info.context_dropped for info in infos),
            "splits": splits}
