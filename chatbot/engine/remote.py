"""A model behind an OpenAI-compatible endpoint (vLLM, KubeRay's Ray Serve LLM).

The prompt is rendered here, as for the engine in the process, and sent to `/completions`: the endpoint's own chat template would not be
what the run was tuned on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from chatbot.config import EngineConfig
from chatbot.engine.base import Decision, End, Load, Piece, Request
from chatbot.errors import BusyError, UserError


class RemoteModel:
    """One model name at an endpoint."""

    def __init__(self, config: EngineConfig, model: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        headers = {}
        if config.key_file:
            headers["Authorization"] = f"Bearer {Path(config.key_file).read_text(encoding='utf-8').strip()}"
        timeout = httpx.Timeout(10.0, read=config.timeout_seconds)
        self.client = httpx.AsyncClient(base_url=config.url.rstrip("/"), headers=headers, timeout=timeout, transport=transport,
                                        trust_env=False, limits=httpx.Limits(max_connections=config.streams + config.waiting))
        self.name = model
        self.context = config.context
        self.limit = config.streams + config.waiting
        self.running = 0

    def load(self) -> Load:
        """Running answers; the endpoint's own line is not known here."""
        return Load(self.running, 0)

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    async def problem(self) -> str:
        """Why the endpoint could not answer now; empty if it names the model."""
        try:
            names = [m["id"] for m in (await self._get("/models"))["data"]]
        except UserError as error:
            return str(error)
        except (KeyError, TypeError):
            return f"The endpoint {self.client.base_url} does not list its models."
        if self.name and self.name not in names:
            return f"The endpoint serves {', '.join(names) or 'no model'}, not {self.name}."
        return ""

    async def _model(self) -> str:
        """The model's name at the endpoint; its only one if none is configured."""
        if not self.name:
            names = [m["id"] for m in (await self._get("/models"))["data"]]
            if len(names) != 1:
                raise UserError(f"The endpoint serves {', '.join(names) or 'no model'}. Name one of them in engine.model.")
            self.name = names[0]
        return self.name

    async def _get(self, path: str) -> Any:
        try:
            response = await self.client.get(path)
            response.raise_for_status()
            return response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise UserError(f"The endpoint {self.client.base_url} does not answer: {error}") from error

    def _body(self, request: Request, model: str) -> dict[str, Any]:
        body = {"model": model, "prompt": request.prompt, "temperature": request.temperature, "top_p": request.top_p,
                "max_tokens": request.max_tokens, "stream": True, "stream_options": {"include_usage": True},
                "add_special_tokens": request.special_tokens}
        if stop := [*request.stop, *request.stop_tokens]:
            body["stop"] = stop
        if request.seed is not None:
            body["seed"] = request.seed
        return body

    async def stream(self, request: Request) -> AsyncIterator[Piece | End]:
        """Answer. See `base.Model`."""
        if self.running >= self.limit:
            raise BusyError(f"{self.running} answers are running. Try again in a moment.")
        self.running += 1
        try:
            began, first, tokens, prompt_tokens, reason, text = time.monotonic(), 0.0, 0, 0, "stop", ""
            body = self._body(request, await self._model())
            async with self.client.stream("POST", "/completions", json=body) as response:
                if response.status_code >= 400:
                    detail = (await response.aread()).decode("utf-8", "replace")[:300]
                    if response.status_code in (429, 503):
                        raise BusyError("The model's endpoint is busy. Try again in a moment.")
                    raise UserError(f"The endpoint refused the question ({response.status_code}): {detail}")
                async for line in response.aiter_lines():
                    if not line.startswith("data:") or line.strip() == "data: [DONE]":
                        continue
                    event = json.loads(line[5:])
                    if "error" in event:
                        raise UserError(f"The endpoint failed: {event['error']}")
                    if usage := event.get("usage"):
                        prompt_tokens, tokens = usage["prompt_tokens"], usage["completion_tokens"]
                    for choice in event.get("choices") or []:
                        reason = choice.get("finish_reason") or reason
                        if piece := choice.get("text"):
                            first = first or time.monotonic() - began
                            tokens, text = tokens + 1, text + piece
                            yield Piece(piece, tokens)
            total = time.monotonic() - began
            decision = await self._decide(request, text) if request.decision else {}
            yield End("length" if reason == "length" else "stop", prompt_tokens, tokens, 0.0, first or total, total, decision)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise UserError(f"The endpoint {self.client.base_url} broke off: {type(error).__name__} {error}") from error
        finally:
            self.running -= 1

    async def _decide(self, request: Request, answer: str) -> dict[str, float]:
        """Probabilities of the decision's words among the endpoint's most likely next tokens; empty if none is among them."""
        decision: Decision = request.decision  # type: ignore[assignment]
        place = answer.rfind(decision.prefix.strip())
        kept = (answer[:place] if place >= 0 else answer).rstrip()
        body = {**self._body(request, await self._model()), "prompt": request.prompt + kept + decision.prefix.rstrip(), "max_tokens": 1,
                "logprobs": 20, "stream": False, "temperature": 0}
        del body["stream_options"]
        response = await self.client.post("/completions", json=body)
        response.raise_for_status()
        likely = ((response.json()["choices"][0].get("logprobs") or {}).get("top_logprobs") or [{}])[0]
        sums = dict.fromkeys(decision.words, 0.0)
        for token, value in likely.items():
            if token.strip() in sums:
                sums[token.strip()] += math.exp(value)
        total = sum(sums.values())
        return {word: value / total for word, value in sums.items()} if total else {}
