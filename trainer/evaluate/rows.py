"""The held-out rows that are evaluated: which, in which order, and what each rank takes."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.formats import answer_text
from trainer.data.shards import TokenShards
from trainer.errors import UserError

CHOICES = ("yes", "no", "maybe")
"""PubMedQA's decisions, in the order of lm-evaluation-harness."""


@dataclass(frozen=True)
class Row:
    """A held-out row, as text and as the tokens that training would have seen."""

    index: int
    """Its place in the split."""
    id: str
    question: str
    context: str
    answer: str
    decision: str
    """One of CHOICES, or empty."""
    reference: str
    """What is expected after the prompt: the answer, and the decision if the run's answers end with it."""
    prompt: list[int]
    """Tokens before the answer."""
    target: list[int]
    """Tokens of the completion, with the one that ends it."""


def held_out(dataset: Path, limit: int, seed: int, decision: bool) -> list[Row]:
    """The rows of `dataset`/test.jsonl with their tokens, in an order shuffled by `seed`; at most `limit` (0: all).

    `decision`: the run's answers end with the decision (run.data.decision).

    The shuffle makes every prefix a random sample: generation takes the first rows, the report's samples the first of those.
    """
    shards, path = TokenShards(dataset, "test"), dataset / "test.jsonl"
    try:
        with open(path, encoding="utf-8") as file:
            documents = [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Remove the dataset directory and run `python -m trainer prepare` "
                        "again.") from None
    if len(documents) != len(shards):
        raise UserError(f"{path} has {len(documents)} rows, the test shards have {len(shards)}. Remove the dataset directory and run "
                        "`python -m trainer prepare` again.")
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    return [_row(i, documents[i], shards, decision) for i in order[:limit or None]]


def _row(index: int, document: dict[str, str], shards: TokenShards, with_decision: bool) -> Row:
    tokens, start = shards.row(index)
    decision = (document.get("decision") or "").strip().lower()
    context = document.get("context") or ""
    return Row(index=index, id=str(document["id"]), question=document["question"],
               context=context if isinstance(context, str) else "\n".join(context),
               answer=document["answer"], decision=decision if decision in CHOICES else "",
               reference=answer_text(document["answer"], decision if with_decision else ""),
               prompt=tokens[:start].tolist(), target=tokens[start:].tolist())


def share(rows: Sequence[Row], rank: int, world: int) -> list[Row]:
    """Rank `rank`'s part: rows by falling length dealt in turn, so that the ranks have like amounts of work."""
    return sorted(rows, key=lambda r: (-len(r.prompt), r.index))[rank::world]


def rows_digest(rows: Sequence[Row]) -> str:
    """sha256 over which rows are evaluated and what is expected: reports with the same digest can be compared."""
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda r: r.index):
        digest.update(json.dumps([row.id, row.question, row.answer, row.decision], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
