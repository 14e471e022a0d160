"""What each worker of a run did and waited, from the lines of metrics.jsonl in which the workers told (trainer/train/loop.py)."""

from __future__ import annotations

from typing import Any


def worker_table(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The workers of a run; empty if none told.

    `ranks`: of each rank its tokens, seconds in which it computed, seconds in which it had computed and the slowest had not, and the
    share of its time that it computed. `seconds`: of the steps that were told of (not those that compiled); `rest`: what is left of
    them after computing and waiting: network, optimizer, data. `budgets`: from which step on each rank's micro-batches were how many
    and how long, in tokens; a new entry where they change.
    """
    told = [(line["step"], line["workers"]) for line in lines if line.get("workers")]
    world = max((len(each["ranks"]) for _, each in told), default=0)
    ranks: list[dict[str, Any]] = [{"rank": rank, "tokens": 0, "compute": 0.0, "wait": 0.0} for rank in range(world)]
    budgets: list[dict[str, Any]] = []
    seconds = rest = 0.0
    for step, each in told:
        for mine, of_rank in zip(ranks, each["ranks"], strict=False):  # a run may have gone on with fewer
            for key in ("tokens", "compute", "wait"):
                mine[key] += of_rank[key]
        seconds += each["seconds"]
        rest += each["seconds"] - each["ranks"][0]["compute"] - each["ranks"][0]["wait"]
        now = [[of_rank["micro_batches"], of_rank["micro_batch_tokens"]] for of_rank in each["ranks"]]
        if not budgets or budgets[-1]["ranks"] != now:
            budgets.append({"step": step - each["steps"] + 1, "ranks": now})
    for mine in ranks:
        mine["share"] = mine["compute"] / seconds if seconds else None
    return {"ranks": ranks, "seconds": seconds, "rest": max(0.0, rest), "budgets": budgets} if told else {}


def describe_budgets(ranks: list[list[int]]) -> str:
    """`4 x 5,888, 4 x 15,360`; many equal ones in a row are counted."""
    parts: list[tuple[str, int]] = []
    for count, tokens in ranks:
        text = f"{count} x {tokens:,}"
        if parts and parts[-1][0] == text:
            parts[-1] = (text, parts[-1][1] + 1)
        else:
            parts.append((text, 1))
    return ", ".join(text if times == 1 else f"{text} ({times} workers)" for text, times in parts)
