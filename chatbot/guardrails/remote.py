"""Optional: a safety model (Llama Guard, or NeMo Guardrails' server) behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from chatbot.config import check
from chatbot.guardrails.base import Finding, Stage, Subject


@dataclass(frozen=True)
class SafetyModelSettings:
    """Where the safety model answers. It says `safe`, or `unsafe` and the categories on the next line (Llama Guard's form)."""

    enabled: bool = False
    url: str = ""
    """For example http://llama-guard:8000/v1."""
    model: str = ""
    timeout_seconds: float = 5.0

    def __post_init__(self) -> None:
        check(not self.enabled or self.url.startswith(("http://", "https://")), "url", self.url, "Give the endpoint, for example http://llama-guard:8000/v1.")
        check(not self.enabled or bool(self.model), "model", self.model, "Give the model's name at the endpoint.")
        check(self.timeout_seconds > 0, "timeout_seconds", self.timeout_seconds, "Give a positive number of seconds.")


class SafetyModelCheck:
    """Asks a safety model about questions and finished answers. No answer from it is a block (fail closed, by the pipeline)."""

    name = "safety-model"
    stages: frozenset[Stage] = frozenset({"input", "output"})

    def __init__(self, settings: SafetyModelSettings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.settings = settings
        self._transport = transport

    async def look(self, subject: Subject) -> Finding | None:
        if not subject.final:
            return None
        role = "user" if subject.stage == "input" else "assistant"
        body: dict[str, Any] = {"model": self.settings.model, "messages": [{"role": role, "content": subject.text}], "temperature": 0,
                                "max_tokens": 20}
        async with httpx.AsyncClient(timeout=self.settings.timeout_seconds, transport=self._transport, trust_env=False) as client:
            response = await client.post(f"{self.settings.url.rstrip('/')}/chat/completions", json=body)
            response.raise_for_status()
        words = response.json()["choices"][0]["message"]["content"].split()
        if not words or words[0].lower() not in ("safe", "unsafe"):
            raise ValueError("the safety model answered neither safe nor unsafe")
        if words[0].lower() == "safe":
            return None
        return Finding("block", "unsafe" if subject.stage == "input" else "output", " ".join(words[1:2]))
