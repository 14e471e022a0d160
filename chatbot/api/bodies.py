"""What the API takes in, checked by pydantic: OpenAI's chat completion request, as far as it makes sense here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from chatbot.serving.prompt import Turn


class TextPart(BaseModel):
    """A part of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """`POST /v1/chat/completions`. Fields that OpenAI's clients send and that mean nothing here are passed over."""

    model_config = ConfigDict(extra="ignore")

    model: str = "tuned"
    messages: Annotated[list[Message], Field(min_length=1, max_length=100)]
    context: str = ""
    """The abstract that the question is about (an extension)."""
    decision: bool = True
    """Give the probabilities of the decision (an extension)."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=8192)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=8192)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> ChatRequest:
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        return self

    @property
    def turns(self) -> list[Turn]:
        """The conversation. A system message of a client is left out unless the format remembers turns; see the API's text."""
        return [Turn("system" if m.role == "developer" else m.role, m.text) for m in self.messages]

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class AskRequest(BaseModel):
    """`POST /ask`: one question, one answer."""

    model_config = ConfigDict(extra="forbid")

    question: str
    context: str = ""
    model: Literal["tuned", "base"] = "tuned"
    max_tokens: Annotated[int, Field(ge=1, le=8192)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None


class FeedbackRequest(BaseModel):
    """`POST /feedback`: a thumb and a comment on an answer."""

    model_config = ConfigDict(extra="forbid")

    exchange: Annotated[str, Field(max_length=64)]
    vote: Literal["up", "down", "tuned", "base"]
    question: str = ""
    context: str = ""
    answer: str = ""
    answer_tuned: str = ""
    answer_base: str = ""
    model: Literal["tuned", "base"] = "tuned"
    comment: Annotated[str, Field(max_length=2000)] = ""


def explain(errors: Any) -> str:
    """pydantic's errors as one line that names the fields (never the values: they may be personal)."""
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in errors)[:500]
