"""The prompt that a model was tuned on, read from its directory.

`model/prompt.json` is written by the export:

    {
      "format": "instruction",              name of the run's format, for people
      "with_context": "...{context}...{question}...",     template with a context, or null: the format has none
      "without_context": "...{question}...",              template without one, or null: the format needs one
      "chat": false,                        true: the template is the user's message and the tokenizer's chat template surrounds it
      "add_special_tokens": true,           the tokenizer adds its beginning-of-sequence token to the prompt
      "stop": ["END_A"],                    tokens that end an answer, besides the tokenizer's end of sequence
      "decision": {"prefix": "\\nDecision: ", "words": ["yes", "no", "maybe"]}      or null: answers have none
    }

The answer follows the template directly; a decision follows the answer as `prefix` and one of `words`. `{question}` and `{context}`
are replaced in one pass, other braces stand for themselves. A model without the file is asked through its tokenizer's chat template,
and without that by the question alone.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatbot.engine.base import Decision
from chatbot.errors import UserError

FILE = "prompt.json"


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


@dataclass(frozen=True)
class PromptFormat:
    """How a question becomes the text before the answer."""

    name: str
    with_context: str | None
    without_context: str | None
    chat: bool
    add_special_tokens: bool
    stop: tuple[str, ...]
    decision: Decision | None

    @property
    def remembers(self) -> bool:
        """Earlier turns are part of the prompt. Formats of single questions were not tuned on conversations."""
        return self.chat

    @property
    def takes_context(self) -> bool:
        return self.with_context is not None

    def render(self, turns: list[Turn], context: str, tokenizer: Any) -> str:
        """The prompt for the last turn (the user's). Raises UserError if the format cannot say it."""
        question, special = turns[-1].content, special_texts(tokenizer)
        if context and self.with_context is None:
            raise UserError(f"This run's prompt format ({self.name}) has no context. Leave the context empty.")
        if not context and self.without_context is None:
            raise UserError(f"This run's prompt format ({self.name}) needs a context. Fill in the context box.")
        template = self.with_context if context else self.without_context
        values = {"question": neutral(question, special), "context": neutral(context, special)}
        text = re.sub(r"\{(question|context)\}", lambda match: values[match.group(1)], template or "")
        if not self.chat or not tokenizer.chat_template:
            return text
        messages = [{"role": t.role, "content": neutral(t.content, special)} for t in turns[:-1]] + [{"role": "user", "content": text}]
        # Llama 3.1's template prints today's date unless it is given one, Qwen's may think aloud: the same answers as in training.
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024",
                                             enable_thinking=False)


PLAIN = PromptFormat("chat template", "{context}\n\n{question}", "{question}", True, False, (), None)
"""For a model directory without prompt.json."""


def special_texts(tokenizer: Any) -> list[str]:
    """Texts that the tokenizer reads as special or added tokens, longest first."""
    added = [str(token) for token in tokenizer.get_added_vocab()] + list(tokenizer.all_special_tokens)
    return sorted({t for t in added if t.strip()}, key=lambda t: (-len(t), t))


def neutral(text: str, special: list[str]) -> str:
    """A user's text without special tokens: with them it could end its own turn and write the next (prompt injection).

    Repeated until none is left, since removing one may make another.
    """
    pattern = re.compile("|".join(map(re.escape, special))) if special else None
    while pattern and pattern.search(text):
        text = pattern.sub("", text)
    return text


def load(directory: Path) -> PromptFormat:
    """The format of a model directory, or `PLAIN`. Raises UserError if the file is there but not usable."""
    path = directory / FILE
    if not path.exists():
        return PLAIN
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        decision = value["decision"] and Decision(value["decision"]["prefix"], tuple(value["decision"]["words"]))
        prompt = PromptFormat(value["format"], value["with_context"], value["without_context"], bool(value["chat"]),
                              bool(value["add_special_tokens"]), tuple(value["stop"]), decision or None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be used ({type(error).__name__}: {error}). Export the run again.") from error
    templates = [t for t in (prompt.with_context, prompt.without_context) if t is not None]
    if not templates or any("{question}" not in t for t in templates) or "{context}" not in (prompt.with_context or "{context}"):
        raise UserError(f"{path}: a template lacks {{question}}, or with_context lacks {{context}}. Export the run again.")
    return prompt
