"""Optional: safety models and rails that run elsewhere (a Llama Guard endpoint, NVIDIA's NeMo Guardrails server).

Each is asked about every question, context and earlier turn, and about the whole answer. No answer from it, or one that it should not
give, is a block (fail closed, by the pipeline).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from chatbot.config import check
from chatbot.guardrails.base import Finding, Stage, Subject


@dataclass(frozen=True)
class EndpointSettings:
    """Where a guardrail answers."""

    enabled: bool = False
    url: str = ""
    """The endpoint's base, for example http://llama-guard:8000/v1."""
    model: str = ""
    key_file: str = ""
    """File with the endpoint's API key (a mounted Secret); empty: none is sent."""
    timeout_seconds: float = 5.0
    hold_answers: bool = True
    """Show an answer only when all of it has been checked. With false it streams, and is ended where it should not have begun."""

    def __post_init__(self) -> None:
        check(not self.enabled or self.url.startswith(("http://", "https://")), "url", self.url,
              "Give the endpoint, for example http://llama-guard:8000/v1.")
        check(self.timeout_seconds > 0, "timeout_seconds", self.timeout_seconds, "Give a positive number of seconds.")


@dataclass(frozen=True)
class SafetyModelSettings(EndpointSettings):
    """An OpenAI-compatible endpoint that says `safe`, or `unsafe` and the categories on the next line (Llama Guard's form)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(not self.enabled or bool(self.model), "model", self.model, "Give the model's name at the endpoint.")


@dataclass(frozen=True)
class NemoSettings(EndpointSettings):
    """A NeMo Guardrails server (0.24 or later); `model` is its main model's name, if its rails ask one."""

    config_id: str = ""
    """The server's guardrails configuration; empty: its default."""


class RemoteCheck:
    """What both have in common: when they look, and how they ask."""

    name: str
    stages: frozenset[Stage] = frozenset({"input", "output"})

    def __init__(self, settings: EndpointSettings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.settings = settings
        self._transport = transport

    def holds_back(self, text: str) -> int:
        """Characters of an unfinished answer that are not shown yet."""
        return len(text) if self.settings.hold_answers else 0

    async def look(self, subject: Subject) -> Finding | None:
        return await self.ask(subject) if subject.final else None

    async def ask(self, subject: Subject) -> Finding | None:
        """Ask the endpoint. Raises if it does not answer, or not in its form."""
        raise NotImplementedError

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {}
        if self.settings.key_file:
            headers["Authorization"] = f"Bearer {Path(self.settings.key_file).read_text(encoding='utf-8').strip()}"
        async with httpx.AsyncClient(timeout=self.settings.timeout_seconds, transport=self._transport, trust_env=False) as client:
            response = await client.post(f"{self.settings.url.rstrip('/')}{path}", json=body, headers=headers)
            response.raise_for_status()
        return response.json()


def message(subject: Subject) -> dict[str, str]:
    """The text as one message of a conversation."""
    return {"role": "user" if subject.stage == "input" else "assistant", "content": subject.text}


def blocked(subject: Subject, rule: str) -> Finding:
    return Finding("block", "unsafe" if subject.stage == "input" else "output", rule)


class SafetyModelCheck(RemoteCheck):
    """Llama Guard, or another model that answers as it does."""

    name = "safety-model"

    async def ask(self, subject: Subject) -> Finding | None:
        answer = await self._post("/chat/completions", {
            "model": self.settings.model, "messages": [message(subject)], "temperature": 0, "max_tokens": 20})
        words = answer["choices"][0]["message"]["content"].split()
        if not words or words[0].lower() not in ("safe", "unsafe"):
            raise ValueError("the safety model answered neither safe nor unsafe")
        return None if words[0].lower() == "safe" else blocked(subject, " ".join(words[1:2]))


class NemoCheck(RemoteCheck):
    """The input and output rails of a NeMo Guardrails server, asked without letting it generate."""

    name = "nemo"
    settings: NemoSettings

    async def ask(self, subject: Subject) -> Finding | None:
        rails: dict[str, Any] = {"rail_types": [subject.stage]}
        if self.settings.config_id:
            rails["config_id"] = self.settings.config_id
        answer = await self._post("/checks", {"model": self.settings.model, "messages": [message(subject)], "guardrails": rails})
        status, rule = answer["status"], str(answer.get("rail") or "")[:60]
        if status == "passed":
            return None
        if status == "modified" and subject.stage == "input" and isinstance(answer["content"], str):
            return Finding("redact", answer["content"], rule)
        if status in ("modified", "blocked"):  # an answer that must be changed is withheld: earlier redactions would be lost
            return blocked(subject, rule)
        raise ValueError("the NeMo Guardrails server answered none of passed, modified, blocked")
