"""Would the target's chatbot have let a report's sample inferences through? Its own guardrails, with its own settings, say so."""

from __future__ import annotations

import asyncio
from typing import Any

from chatbot.config import GuardrailsConfig
from chatbot.guardrails.base import Who
from chatbot.guardrails.pipeline import Pipeline
from tools.environments import Environment

REMOTE = "safety-model"
"""The one check that asks a server inside the target's cluster, where a promotion does not run."""


def guardrails_of(environment: Environment) -> GuardrailsConfig:
    """The guardrails that an environment's values configure, without the remote one. Raises chatbot.errors.ConfigError."""
    own = environment.values.get("chatbot", {}).get("config", {}).get("guardrails", {})
    checks = {name: settings for name, settings in (own.get("checks") or {}).items() if name != REMOTE}
    return GuardrailsConfig(checks=checks, texts=own.get("texts") or {})


def check_samples(report: dict[str, Any], config: GuardrailsConfig) -> list[dict[str, Any]]:
    """One {"passed", "text"} for each sample of a report, in the gate's form; one that fails if it has none.

    A sample passes if its question reaches the model and the tuned answer reaches the reader whole: not ended, nothing redacted.
    """
    samples = report.get("samples") or []
    if not samples:
        return [{"passed": False, "text": "guardrails: the report has no sample answers (run.evaluation.samples)"}]
    return asyncio.run(_all(Pipeline(config), samples))


async def _all(pipeline: Pipeline, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [await _one(pipeline, sample, str(index)) for index, sample in enumerate(samples)]


async def _one(pipeline: Pipeline, sample: dict[str, Any], asker: str) -> dict[str, Any]:
    # Each sample has an asker of its own: the rate limit is about people.
    asked = await pipeline.question(str(sample.get("question", "")), str(sample.get("context") or ""), [], Who(asker, asker))
    guard = pipeline.answer()
    await guard.push(str(sample.get("tuned", "")))
    await guard.finish()
    name = f"guardrails: sample {sample.get('id', asker)}"
    if asked.stop is not None:
        return {"passed": False, "text": f"{name}: the question is stopped by {asked.stop.check} ({asked.stop.rule})"}
    if guard.verdicts:
        found = ", ".join(f"{v.check} ({v.rule}): {v.action}" for v in guard.verdicts)
        return {"passed": False, "text": f"{name}: the tuned model's answer is not let through whole: {found}"}
    return {"passed": True, "text": f"{name}: passes every check of {len(pipeline.checks)}"}
