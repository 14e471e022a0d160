"""One chunk of a source, tokenised: what a preparation process does.

A part is three files: `part-00012.safetensors` (arrays), `part-00012.text.jsonl` (the held-out rows as text) and, written last,
`part-00012.json` (counts, rejected rows, the sizes of the other two). A part with whole files is never made again.

The tokenizer is the Rust one alone, and asked for each word once (trainer/data/words.py).
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from trainer.data import duplicates, split
from trainer.data.formats import Template, answer_text
from trainer.data.readers import Chunk, read, snippet
from trainer.data.rows import Reject, Row, normalise
from trainer.data.shards import map_safetensors
from trainer.data.words import Span, WordEncoder

BATCH_ROWS = 256
SAMPLES_PER_REASON = 5
"""Rejected rows that a part keeps of each reason."""

NOT_COUNTED = ("excluded id", "official test id")
"""Reasons that are the user's wish, not the data's fault."""

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)|[。！？]")


@dataclass(frozen=True)
class Settings:
    """What every preparation process needs; picklable."""

    directory: str
    """Where parts are written."""
    tokenizer_file: str
    template: Template
    special_ids: tuple[int, ...]
    """Ids that only the template may produce."""
    columns: Mapping[str, str]
    context: bool
    decision: bool
    max_tokens: int
    test_share: float
    seed: int
    near_duplicates: float
    excluded: frozenset[str] = frozenset()
    official: frozenset[str] = frozenset()


@dataclass
class PartInfo:
    """What is known of a finished part."""

    rows_read: int = 0
    rows: int = 0
    shortened: int = 0
    """Rows whose context was shortened."""
    context_dropped: int = 0
    """Rows whose context found no room at all."""
    rejected: dict[str, int] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)


def names(directory: Path, index: int) -> tuple[Path, Path, Path]:
    """A part's arrays, texts and counts."""
    stem = f"part-{index:05d}"
    return directory / f"{stem}.safetensors", directory / f"{stem}.text.jsonl", directory / f"{stem}.json"


def finished(directory: Path, index: int) -> PartInfo | None:
    """The part if it is whole."""
    arrays, texts, info = names(directory, index)
    try:
        part = PartInfo(**json.loads(info.read_text(encoding="utf-8")))
        whole = part.sizes == {"arrays": arrays.stat().st_size, "texts": texts.stat().st_size}
    except (OSError, ValueError, TypeError):
        return None
    return part if whole else None


def arrays_of(directory: Path, index: int) -> dict[str, NDArray[Any]]:
    """A part's arrays, mapped into memory; unsigned ones as what they are."""
    tensors, _ = map_safetensors(names(directory, index)[0])
    for name in ("id_hash", "content_hash", "order"):
        tensors[name] = tensors[name].view(np.uint64)
    for name in ("shingles", "bands"):
        tensors[name] = tensors[name].view(np.uint32)
    return tensors


_worker: PartMaker | None = None


def start_worker(settings: Settings) -> None:
    """Set a process up: one thread (the processes are the parallelism), and an end together with its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if (parent := parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    global _worker
    _worker = PartMaker(settings)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def make_part(index: int, chunk: Chunk) -> PartInfo:
    """Make a part in a process that `start_worker` has set up."""
    assert _worker is not None
    return _worker.make(index, chunk)


class PartMaker:
    """Makes parts."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = Tokenizer.from_file(settings.tokenizer_file)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.words = WordEncoder(self.tokenizer)
        self.special = np.zeros(self.tokenizer.get_vocab_size(with_added_tokens=True) + 1, dtype=bool)
        self.special[list(settings.special_ids)] = True
        # No text of n characters has fewer than n / longest tokens: what is certainly too long is never tokenised.
        longest = max((len(token) for token in self.tokenizer.get_vocab(with_added_tokens=True)), default=1)
        self.most_characters = settings.max_tokens * longest
        self.expected = {flag: self._special_count(settings.template.prompt("a", "a" if flag else "")) for flag in (False, True)}
        self.expected_end = self._special_count(settings.template.completion("a"))

    def _special_count(self, text: str) -> int:
        return int(self.special[self.words.ids(text)].sum())

    def make(self, index: int, chunk: Chunk) -> PartInfo:
        """Tokenise a chunk and write its files. Memory is bounded by the chunk."""
        directory = Path(self.settings.directory)
        arrays_path, texts_path, info_path = names(directory, index)
        info, counts = PartInfo(), Counter[str]()
        taken: list[_Batch] = []

        def reject(row: Reject) -> None:
            counts[row.reason] += 1
            if counts[row.reason] <= SAMPLES_PER_REASON:
                info.samples.append(asdict(row))

        with open(texts_path, "w", encoding="utf-8") as texts:
            rows = read(chunk)
            while raw := list(islice(rows, BATCH_ROWS)):
                info.rows_read += len(raw)
                usable: list[tuple[Row, str]] = []
                for one in raw:
                    row = normalise(one, self.settings.columns)
                    if isinstance(row, Reject):
                        reject(row)
                    elif len(row.question) + len(row.answer) > self.most_characters:
                        reject(Reject("too long", one.where, snippet(row.question)))
                    else:
                        usable.append((row, one.where))
                if usable:
                    batch = self._batch(usable, reject, info)
                    taken.append(batch)
                    texts.writelines(batch.texts)
        info.rows = sum(len(batch.answer_start) for batch in taken)
        info.rejected = dict(counts)
        save_file(_arrays(taken), arrays_path)
        info.sizes = {"arrays": arrays_path.stat().st_size, "texts": texts_path.stat().st_size}
        temporary = info_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(info)), encoding="utf-8")
        os.replace(temporary, info_path)
        return info

    def _batch(self, rows: list[tuple[Row, str]], reject: Callable[[Reject], None], info: PartInfo) -> _Batch:
        s = self.settings
        content = [_content_hash(row) for row, _ in rows]
        # A row without an id is named by its content, so that its place does not matter.
        ids = [row.id or f"{c:016x}" for (row, _), c in zip(rows, content, strict=True)]
        contexts = [row.context[: self.most_characters] if s.context and s.template.takes_context else "" for row, _ in rows]
        prompts = [s.template.prompt(row.question, c) for (row, _), c in zip(rows, contexts, strict=True)]
        decisions = [row.decision if s.decision else "" for row, _ in rows]
        completions = [s.template.completion(row.answer, d) for (row, _), d in zip(rows, decisions, strict=True)]
        prompt_tokens, completion_tokens = ([self.words.ids(text) for text in texts] for texts in (prompts, completions))

        keep = []
        for i, (row, where) in enumerate(rows):
            reason = ""
            if ids[i] in s.official:
                reason = "official test id"
            elif ids[i] in s.excluded:
                reason = "excluded id"
            elif (self.special[prompt_tokens[i]].sum() != self.expected[bool(contexts[i])]
                    or self.special[completion_tokens[i]].sum() != self.expected_end):
                reason = "special token in the text"
            elif len(prompt_tokens[i]) + len(completion_tokens[i]) > s.max_tokens:
                room = s.max_tokens - len(completion_tokens[i])
                fitted = self._shorten(row, contexts[i], prompt_tokens[i], room) if contexts[i] else None
                if fitted is None:
                    reason = "too long"
                else:
                    contexts[i], prompts[i], prompt_tokens[i] = fitted
                    info.shortened += bool(contexts[i])
                    info.context_dropped += not contexts[i]
            if reason:
                reject(Reject(reason, where, json.dumps({"id": ids[i], "question": row.question[:200]}, ensure_ascii=False)))
            else:
                keep.append(i)

        keys = split.order_keys((ids[i] for i in keep), s.seed)
        held_out = split.held_out(keys, s.test_share)
        texts = [json.dumps({"id": ids[i], "question": rows[i][0].question, "context": contexts[i], "answer": rows[i][0].answer,
                             "decision": rows[i][0].decision, "reference": answer_text(rows[i][0].answer, decisions[i]),
                             "prompt": prompts[i], "completion": completions[i]}, ensure_ascii=False) + "\n"
                 for i, out in zip(keep, held_out, strict=True) if out]
        if s.near_duplicates < 1:
            shingles, starts = duplicates.shingles(["\n".join((r.question, r.context, r.answer)) for r, _ in (rows[i] for i in keep)])
            bands = duplicates.band_keys(shingles, starts, duplicates.bands(s.near_duplicates))
        else:
            shingles, starts = np.zeros(0, dtype=np.uint32), np.zeros(len(keep) + 1, dtype=np.int64)
            bands = np.zeros((len(keep), 0), dtype=np.uint32)
        return _Batch(tokens=[part for i in keep for part in (prompt_tokens[i], completion_tokens[i])],
                      answer_start=np.array([len(prompt_tokens[i]) for i in keep], dtype=np.int32),
                      lengths=np.array([len(prompt_tokens[i]) + len(completion_tokens[i]) for i in keep], dtype=np.int64),
                      ids=[ids[i].encode("utf-8") for i in keep],
                      id_hash=np.array([split.hash64(ids[i]) for i in keep], dtype=np.uint64),
                      content_hash=np.array([content[i] for i in keep], dtype=np.uint64), order=keys, held_out=held_out,
                      shingles=shingles, shingle_counts=np.diff(starts), bands=bands, texts=texts)

    def _shorten(self, row: Row, context: str, ids: NDArray[np.int32], room: int) -> tuple[str, str, NDArray[np.int32]] | None:
        """Context, prompt and its tokens within `room` tokens; the context ends after a sentence, else after a word, where it can.

        `ids`: of the prompt with the whole context. Without any room for it the context is left out; None if even then the prompt does
        not fit.
        """
        template = self.settings.template
        start = template.context_start(row.question)
        prompt = template.prompt(row.question, context)
        while context:
            excess = len(ids) - room
            if excess <= 0:
                return context, prompt, ids
            context = _cut(context, _end_without(self.words.spans(prompt), start, start + len(context), excess) - start)
            prompt = template.prompt(row.question, context)
            ids = self.words.ids(prompt)
        return ("", prompt, ids) if len(ids) <= room else None


@dataclass(frozen=True)
class _Batch:
    tokens: list[NDArray[np.int32]]
    lengths: NDArray[np.int64]
    answer_start: NDArray[np.int32]
    ids: list[bytes]
    id_hash: NDArray[np.uint64]
    content_hash: NDArray[np.uint64]
    order: NDArray[np.uint64]
    held_out: NDArray[np.bool_]
    shingles: NDArray[np.uint32]
    shingle_counts: NDArray[np.int64]
    bands: NDArray[np.uint32]
    texts: list[str]


def _arrays(batches: list[_Batch]) -> dict[str, NDArray[Any]]:
    """All batches as one part. Unsigned numbers are stored as signed ones of the same bits (see arrays_of)."""
    def joined(name: str, kind: Any) -> NDArray[Any]:
        return np.concatenate([getattr(b, name) for b in batches]) if batches else np.zeros(0, dtype=kind)

    tokens = [part for batch in batches for part in batch.tokens]
    ids = [i for batch in batches for i in batch.ids]
    bands = [b.bands for b in batches if len(b.bands)]
    return {
        "tokens": np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.int32),
        "offsets": _offsets(joined("lengths", np.int64)),
        "answer_start": joined("answer_start", np.int32),
        "ids": np.frombuffer(b"".join(ids), dtype=np.uint8).copy(),
        "id_offsets": _offsets(np.array([len(i) for i in ids], dtype=np.int64)),
        "id_hash": joined("id_hash", np.uint64).view(np.int64),
        "content_hash": joined("content_hash", np.uint64).view(np.int64),
        "order": joined("order", np.uint64).view(np.int64),
        "held_out": joined("held_out", np.bool_).astype(np.uint8),
        "shingles": joined("shingles", np.uint32).view(np.int32),
        "shingle_offsets": _offsets(joined("shingle_counts", np.int64)),
        "bands": np.ascontiguousarray(np.concatenate(bands)).view(np.int32) if bands else np.zeros((0, 0), dtype=np.int32),
    }


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _content_hash(row: Row) -> int:
    """Rows that differ in white space and capitals only are the same row."""
    return split.hash64(*(" ".join(text.lower().split()) for text in (row.question, row.context, row.answer)))


def _end_without(spans: list[Span], start: int, end: int, excess: int) -> int:
    """Character up to which the context can stay if its last `excess` tokens go; `start` and `end` are the context's borders."""
    inside = [begin for begin, stop in spans if begin < end and stop > start]
    return inside[-excess] if excess < len(inside) else start


def _cut(context: str, length: int) -> str:
    """At most the first `length` characters, ending after a sentence if that keeps most of it, else after a word; always shorter."""
    kept = context[: max(0, min(length, len(context) - 1))]
    if not kept or context[len(kept)].isspace():
        return kept.rstrip()
    ends = [match.end() for match in _SENTENCE_END.finditer(kept)]
    if ends and ends[-1] >= 0.8 * len(kept):
        return kept[: ends[-1]]
    blank = max(kept.rfind(c) for c in " \n\t")
    return (kept[:blank] if blank >= 0.5 * len(kept) else kept).rstrip()


