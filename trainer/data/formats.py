"""From a question to the text that the model reads, and from an answer to the text that it learns to write.

The one place for prompts: preparation, evaluation and the chatbot all render through it. Nothing here needs torch.

Prompts and completions are tokenised apart from each other and without automatic special tokens (`encode`): what belongs at the
start (for example Llama's `<|begin_of_text|>`) and at the end is part of the text. A row's tokens are therefore exactly
`encode(prompt) + encode(completion)`, in training as in generation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS: dict[str, tuple[str, ...]] = {
    "instruction": (),
    "tags": ("START_Q", "END_Q", "START_A", "END_A"),
    "tags-context": ("START_Q", "END_Q", "START_C", "END_C", "START_A", "END_A"),
    "chat": (),
}
"""Tokens that each format adds to the tokenizer."""

DECISION = "\nDecision: "
"""Between an answer and its decision (yes, no, maybe)."""

_QUESTION, _CONTEXT, _ANSWER = "\ue000question\ue000", "\ue000context\ue000", "\ue000answer\ue000"
_MARKS = re.compile(f"({_QUESTION}|{_CONTEXT})")
_PLAIN = f"### Question:\n{_QUESTION}"
_WITH_CONTEXT = f"### Context:\n{_CONTEXT}\n\n### Question:\n{_QUESTION}"


@dataclass(frozen=True)
class Template:
    """A format resolved for one tokenizer: fixed pieces of text around question and context. Small, picklable."""

    format: str
    plain: tuple[str, ...]
    """Pieces of a prompt without context; odd ones are the marks."""
    with_context: tuple[str, ...]
    """Pieces of a prompt with context; the same as `plain` if the format never gives it."""
    end: str
    """What closes a completion: the format's closing tag, if any, and the end-of-sequence or end-of-turn token."""

    @property
    def takes_context(self) -> bool:
        """Whether the format gives the context at all."""
        return self.with_context != self.plain

    def prompt(self, question: str, context: str = "") -> str:
        """What the model reads."""
        pieces = list(self.with_context if context and self.takes_context else self.plain)
        for i in range(1, len(pieces), 2):
            pieces[i] = question if pieces[i] == _QUESTION else context
        return "".join(pieces)

    def context_start(self, question: str) -> int:
        """Index of the context's first character in `prompt(question, context)`."""
        start = 0
        for piece in self.with_context:
            if piece == _CONTEXT:
                return start
            start += len(question if piece == _QUESTION else piece)
        raise ValueError(f"the format {self.format} gives no context")

    def completion(self, answer: str, decision: str = "") -> str:
        """What the model learns to write after the prompt."""
        return answer_text(answer, decision) + self.end


def answer_text(answer: str, decision: str = "") -> str:
    """An answer as the model should give it: with its decision, if it has one, on a line of its own."""
    return f"{answer}{DECISION}{decision}" if decision else answer


def template(format: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The format's text for this tokenizer. Raises UserError or ConfigError if the tokenizer cannot express it."""
    if format not in SPECIAL_TOKENS:
        raise ConfigError("run.data.format", format, f"Give one of {', '.join(SPECIAL_TOKENS)}.")
    vocabulary = tokenizer.get_added_vocab()
    missing = [token for token in SPECIAL_TOKENS[format] if token not in vocabulary]
    if missing:
        raise UserError(f"The tokenizer lacks the tokens {', '.join(missing)} of the format {format}; "
                        "load it with trainer.model.tokenizer.load_tokenizer, or from the exported model.")
    if format == "chat":
        return _chat(tokenizer)
    if tokenizer.eos_token is None:
        raise UserError("The tokenizer has no end-of-sequence token, so answers could not end. Use the model's own tokenizer.")
    start = _start(tokenizer)
    if format == "instruction":
        head, tail = f"{start}Answer the question.\n\n", "\n\n### Answer:\n"
        return Template(format, _split(head + _PLAIN + tail), _split(head + _WITH_CONTEXT + tail), tokenizer.eos_token)
    question = f"{start}START_Q{_QUESTION}END_Q"
    plain = _split(f"{question}START_A")
    with_context = _split(f"{question}START_C{_CONTEXT}END_CSTART_A") if format == "tags-context" else plain
    return Template(format, plain, with_context, f"END_A{tokenizer.eos_token}")


def render_prompt(format: str, question: str, context: str = "", tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The prompt for a question, with its context if it has one and the format gives it. For many prompts keep a `template`."""
    if tokenizer is None:
        raise ValueError("a tokenizer is needed: its start token and chat template are part of the prompt")
    return template(format, tokenizer).prompt(question, context)


def chat_messages() -> tuple[str, str]:
    """The user's message of the format `chat` without and with a context, with {question} and {context} in their places."""
    plain, with_context = (body.replace(_QUESTION, "{question}").replace(_CONTEXT, "{context}") for body in (_QUESTION, _WITH_CONTEXT))
    return plain, with_context


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt or a completion: special tokens only where the text has them."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def contains_special(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether text of a user would be read as one of the tokenizer's special tokens (and so could forge a turn or an end)."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return not special.isdisjoint(encode(tokenizer, text))


def _split(text: str) -> tuple[str, ...]:
    return tuple(_MARKS.split(text))


def _start(tokenizer: PreTrainedTokenizerBase) -> str:
    """The start token's text, if this tokenizer is used with one."""
    with_special, without = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (True, False))
    if tokenizer.bos_token_id is not None and with_special[:1] == [tokenizer.bos_token_id] and without[:1] != with_special[:1]:
        return str(tokenizer.bos_token)
    return ""


def _chat(tokenizer: PreTrainedTokenizerBase) -> Template:
    if not tokenizer.chat_template:
        raise ConfigError("run.data.format", "chat", "The tokenizer has no chat template; use an instruct model, or another format.")

    def render(messages: list[dict[str, str]], **options: Any) -> str:
        # Llama 3.1's template prints today's date unless it is given: a prompt must not depend on the day.
        text = tokenizer.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024", enable_thinking=False, **options)
        assert isinstance(text, str)
        return text

    plain, with_context = (render([{"role": "user", "content": body}], add_generation_prompt=True)
                           for body in (_QUESTION, _WITH_CONTEXT))
    whole = render([{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}])
    if plain.count(_QUESTION) != 1 or with_context.count(_CONTEXT) != 1 or whole.count(_ANSWER) != 1:
        raise ConfigError("run.data.format", "chat", "The tokenizer's chat template does not repeat the messages word for word; "
                          "use another format.")
    end = whole.split(_ANSWER, 1)[1]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    closing = min((t for t in special if t in end), key=end.index, default=None)
    # The end of the turn, without what the template puts after it (SmolLM2: a line break).
    end = end[: end.index(closing) + len(closing)] if closing else f"{end.rstrip()}{tokenizer.eos_token}"
    return Template("chat", _split(plain), _split(with_context), end)
