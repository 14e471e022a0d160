"""The chatbot's configuration: one YAML file.

    storage: /storage
    serve:      {run: pubmedqa-0a1b2c3d4e, sha256: <digest>, follow: none, base: false}
    engine:     {kind: transformers, streams: 16, ...}
    server:     {host: 127.0.0.1, port: 7860, ...}
    access:     {mode: users, users_file: /secrets/users, ...}
    guardrails: {checks: [...], ...}
    records:    {directory: /storage/chatbot, ...}
    page:       {title: ..., ...}

Every part has defaults; `storage` is where the shared storage is mounted. Every path that is written to is in this file.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from chatbot.errors import ConfigError

RUN_ID = re.compile(r"^[a-z][a-z0-9-]{0,46}$")
"""A run id `<run>-<hash>`: the name of its directory under <storage>/runs."""


def check(ok: bool, field: str, value: object, remedy: str) -> None:
    """Raise ConfigError(field, value, remedy) unless `ok`."""
    if not ok:
        raise ConfigError(field, value, remedy)


def check_networks(field: str, values: list[str]) -> None:
    """Every value is an address or a network (CIDR)."""
    for i, value in enumerate(values):
        try:
            ipaddress.ip_network(value, strict=False)
        except ValueError:
            raise ConfigError(f"{field}[{i}]", value, "Give an address or a network, for example 10.42.0.0/16.") from None


@dataclass(frozen=True)
class ServeConfig:
    """Which model is served."""

    run: str = ""
    """Run id; its model is <storage>/runs/<run>/model. Empty with `follow: latest`."""
    sha256: str = ""
    """Digest of the exported weights (`checkpoint_sha256` of the run's report); the model is refused if it differs."""
    follow: Literal["none", "latest"] = "none"
    """`latest`: serve the newest finished run and move to a newer one when it appears (for development)."""
    every_seconds: float = 5.0
    """How often the storage is looked at: for a newer run, and whether the served one is still there."""
    verify: bool = True
    """Read every file of the model once at start and compare its sha256 with the manifest's (the pages stay cached)."""
    base: bool = False
    """Load the base model beside the tuned one, for the switch and side by side. Needs memory for both."""
    base_path: str = ""
    """Base model's directory on the shared storage, relative to its root (empty: what the run's run.yaml names)."""
    base_gguf_file: str = ""
    """File inside `base_path`, if the base model is shipped as GGUF."""

    def __post_init__(self) -> None:
        if self.follow == "none":
            check(bool(RUN_ID.fullmatch(self.run)), "serve.run", self.run,
                  "Name the run that is served (make results prints it), or set serve.follow: latest.")
        else:
            check(self.run == "" and self.sha256 == "", "serve.run", self.run or self.sha256,
                  "serve.follow: latest picks the run itself; leave serve.run and serve.sha256 empty, or set serve.follow: none.")
        check(bool(re.fullmatch(r"([0-9a-f]{64})?", self.sha256)), "serve.sha256", self.sha256,
              "Give the 64 hex digits of checkpoint_sha256 in the run's report.json, or leave it empty.")
        check(self.every_seconds > 0, "serve.every_seconds", self.every_seconds, "Give a positive number of seconds.")
        for name in ("base_path", "base_gguf_file"):
            path = Path(getattr(self, name))
            check(not path.is_absolute() and ".." not in path.parts, f"serve.{name}", str(path),
                  "Give a path relative to the shared storage, without '..'.")


@dataclass(frozen=True)
class EngineConfig:
    """How answers are generated."""

    kind: Literal["transformers", "openai"] = "transformers"
    """In this process, or by an OpenAI-compatible endpoint (vLLM, Ray Serve LLM)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the GPU if there is one."""
    precision: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"
    """Type of the weights. `auto`: bfloat16 on a GPU, float32 on a CPU. int8 and int4 are for GPUs (bitsandbytes)."""
    streams: int = 16
    """Answers generated at the same time; more wait in line."""
    waiting: int = 64
    """Longest line; a request beyond it is told to come back (503)."""
    context: int = 2048
    """Most tokens of prompt and answer together (bounded by the model's own limit). Decides the cache's memory."""
    prefill: int = 0
    """Prompt tokens read in one step, beside one token of each running answer (0: 256 on a CPU, 2048 on a GPU)."""
    threads: int = 0
    """CPU threads of the arithmetic (0: the cores that this process may use)."""
    graphs: bool = True
    """Record the decoding step as CUDA graphs (GPU only)."""
    url: str = ""
    """With `kind: openai`: the endpoint, for example http://vllm:8000/v1."""
    model: str = ""
    """With `kind: openai`: the tuned model's name there (empty: its only one)."""
    base_model: str = ""
    """With `kind: openai`: the base model's name there (empty: none)."""
    key_file: str = ""
    """With `kind: openai`: file with the endpoint's API key (a mounted Secret)."""
    timeout_seconds: float = 120.0
    """Longest wait for the next piece of an answer."""

    def __post_init__(self) -> None:
        check(1 <= self.streams <= 1024, "engine.streams", self.streams, "Give 1 to 1024.")
        check(self.waiting >= 0, "engine.waiting", self.waiting, "Give 0 or a positive number.")
        check(self.context >= 64, "engine.context", self.context, "Give at least 64 tokens.")
        check(self.prefill == 0 or self.prefill >= 16, "engine.prefill", self.prefill, "Give 0 (by device) or at least 16 tokens.")
        check(self.threads >= 0, "engine.threads", self.threads, "Give 0 (all cores) or a positive number.")
        check(self.timeout_seconds > 0, "engine.timeout_seconds", self.timeout_seconds, "Give a positive number of seconds.")
        check(self.kind != "openai" or bool(re.match(r"https?://", self.url)), "engine.url", self.url,
              "Give the endpoint's address, for example http://vllm:8000/v1, or set engine.kind: transformers.")
        check(not (self.precision in ("int8", "int4") and self.device == "cpu"), "engine.precision", self.precision,
              "8-bit and 4-bit weights need a GPU; use float32 or bfloat16 on a CPU.")


@dataclass(frozen=True)
class ServerConfig:
    """The listening side."""

    host: str = "127.0.0.1"
    """Address to bind to; 0.0.0.0 in a container."""
    port: int = 7860
    """Port of page, API, health and metrics."""
    root_path: str = ""
    """Path under which an ingress shows the chatbot, for example /chat."""
    max_body_bytes: int = 262144
    """Largest request body."""
    body_seconds: float = 20.0
    """Longest time that a client may take to send a request's body."""
    shutdown_seconds: float = 60.0
    """After SIGTERM: how long running answers may go on before they are cut."""
    temporary: str = "/tmp/chatbot"
    """Directory for temporary files (Gradio, Hugging Face): the only one that is written to besides `records`."""

    def __post_init__(self) -> None:
        check(1 <= self.port <= 65535, "server.port", self.port, "Give 1 to 65535.")
        check(self.root_path == "" or bool(re.fullmatch(r"(/[\w.-]+)+", self.root_path)), "server.root_path", self.root_path,
              "Give a path that starts with / and does not end with it.")
        check(self.max_body_bytes >= 1024, "server.max_body_bytes", self.max_body_bytes, "Give at least 1024 bytes.")
        check(self.body_seconds > 0, "server.body_seconds", self.body_seconds, "Give a positive number of seconds.")
        check(self.shutdown_seconds >= 0, "server.shutdown_seconds", self.shutdown_seconds, "Give 0 or more seconds.")
        check(os.path.isabs(self.temporary), "server.temporary", self.temporary, "Give an absolute path.")


@dataclass(frozen=True)
class AccessConfig:
    """Who may use it. `none` is for a service that only the cluster (or this machine) can reach."""

    mode: Literal["none", "users", "proxy"] = "none"
    """Nobody logs in; users from a file; a proxy in front has logged them in and names them in a header."""
    users_file: str = ""
    """With `users`: one `name:hash` a line (a mounted Secret); `python -m chatbot password` makes the hash."""
    session_key_file: str = ""
    """With `users`: file with 32 or more random bytes that sign sessions, the same on every replica (empty: made at start)."""
    session_hours: float = 12.0
    """How long a login lasts."""
    header: str = "X-Forwarded-User"
    """With `proxy`: the header that names the user."""
    trusted: list[str] = field(default_factory=list)
    """Addresses and networks of proxies whose headers (the user, and X-Forwarded-For) are believed."""

    def __post_init__(self) -> None:
        check_networks("access.trusted", self.trusted)
        check(self.mode != "users" or bool(self.users_file), "access.users_file", self.users_file,
              "Name the file with the users, or set access.mode to none or proxy.")
        check(self.mode != "proxy" or bool(self.trusted), "access.trusted", self.trusted,
              "Name the proxy's addresses: a user header from anybody else must not be believed.")
        check(bool(re.fullmatch(r"[A-Za-z0-9-]+", self.header)), "access.header", self.header, "Give a header's name.")
        check(self.session_hours > 0, "access.session_hours", self.session_hours, "Give a positive number of hours.")


@dataclass(frozen=True)
class GuardrailsConfig:
    """The pipeline. `checks` replaces settings of built-in checks by name, or switches them off."""

    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings by check, for example `length: {max_characters: 4000}` or `unsafe: {enabled: false}`; see guardrails/registry.py."""
    texts: dict[str, str] = field(default_factory=dict)
    """Own fixed texts by name (crisis, emergency, referral, ...), for example with local telephone numbers."""


@dataclass(frozen=True)
class RecordsConfig:
    """What is kept. An empty directory keeps nothing."""

    directory: str = ""
    """Directory for feedback-*.jsonl and audit-*.jsonl, on the shared storage or a volume of its own."""
    feedback: bool = True
    """Keep what users say with thumbs and comments, with the question and answer that it is about (personal data redacted)."""
    audit: bool = True
    """Keep a line for each exchange: hashes, lengths, latencies, verdicts; never its text."""
    rotate_bytes: int = 16_000_000
    """A file that has grown to this size is closed and a new one begun."""
    keep_files: int = 64
    """Oldest audit files beyond this number are removed (feedback is never removed)."""

    def __post_init__(self) -> None:
        check(self.directory == "" or os.path.isabs(self.directory), "records.directory", self.directory, "Give an absolute path, or none.")
        check(self.rotate_bytes >= 4096, "records.rotate_bytes", self.rotate_bytes, "Give at least 4096 bytes.")
        check(self.keep_files >= 1, "records.keep_files", self.keep_files, "Keep at least one file.")


@dataclass(frozen=True)
class PageConfig:
    """The page and the defaults of a question."""

    title: str = "Ask the fine-tuned model"
    """Heading and browser title."""
    examples: list[str] = field(default_factory=lambda: [
        "Does vitamin D supplementation reduce the risk of respiratory infections?",
        "Is early mobilisation after hip surgery associated with fewer complications?",
        "Can statins lower the incidence of dementia?"])
    """Questions offered on the empty page."""
    temperature: float = 0.0
    """0 is the most likely answer each time."""
    top_p: float = 1.0
    """Share of the probability from which tokens are drawn."""
    max_tokens: int = 256
    """Longest answer."""

    def __post_init__(self) -> None:
        check(0 <= self.temperature <= 2, "page.temperature", self.temperature, "Give 0 to 2.")
        check(0 < self.top_p <= 1, "page.top_p", self.top_p, "Give a share above 0, at most 1.")
        check(1 <= self.max_tokens <= 8192, "page.max_tokens", self.max_tokens, "Give 1 to 8192 tokens.")


@dataclass(frozen=True)
class Config:
    """A whole configuration file."""

    serve: ServeConfig
    """Which model is served."""
    storage: str = "/storage"
    """Where the shared storage is mounted (read-only is enough, but for `records`)."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How answers are generated."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """The listening side."""
    access: AccessConfig = field(default_factory=AccessConfig)
    """Who may use it."""
    guardrails: GuardrailsConfig = field(default_factory=GuardrailsConfig)
    """Checks on input and output."""
    records: RecordsConfig = field(default_factory=RecordsConfig)
    """Feedback and audit."""
    page: PageConfig = field(default_factory=PageConfig)
    """The page."""

    def __post_init__(self) -> None:
        check(os.path.isabs(self.storage), "storage", self.storage, "Give an absolute path.")
        check(not (self.engine.kind == "openai" and self.serve.base and not self.engine.base_model), "serve.base", True,
              "Name the base model at the endpoint (engine.base_model), or set serve.base: false.")

    @property
    def storage_path(self) -> Path:
        """Root of the shared storage."""
        return Path(self.storage)


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` (from YAML) as the type `kind`; ConfigError with the field's place if it is not of that type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        check(isinstance(value, dict), where or "the file", value, "Give a mapping of fields.")
        fields = {f.name: f for f in dataclasses.fields(kind)}
        hints = typing.get_type_hints(kind)
        prefix = f"{where}." if where else ""
        for key in value:
            check(key in fields, f"{prefix}{key}", value[key], f"Unknown field; {where or 'the file'} has {', '.join(fields)}.")
        for name, f in fields.items():
            if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{prefix}{name}", None, "This field is required.")
        return typing.cast(Any, kind)(**{k: _build(hints[k], v, f"{prefix}{k}") for k, v in value.items()})
    if origin is Literal:
        check(any(value == a and type(value) is type(a) for a in args), where, value, f"Give one of {', '.join(map(str, args))}.")
        return value
    if origin is list:
        check(isinstance(value, list), where, value, "Give a list.")
        return [_build(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        check(isinstance(value, dict) and all(isinstance(k, str) for k in value), where, value, "Give a mapping.")
        return {k: _build(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is Any:
        return value
    if kind is float:
        check(isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300, where, value, "Give a number.")
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    check(isinstance(value, kind) and not (kind is int and isinstance(value, bool)), where, value,
          {int: "Give a whole number.", str: "Give text.", bool: "Give true or false."}.get(kind, f"Give {kind}."))
    return value


def build(kind: Any, value: Any, where: str) -> Any:
    """A dataclass from plain values; ConfigError names the field as `where`.field. Used for guardrail settings too."""
    return _build(kind, value, where)


def parse(document: Any) -> Config:
    """A Config from a parsed YAML document. Raises ConfigError naming the field, the value and the remedy."""
    return typing.cast(Config, _build(Config, document, ""))


def load(source: str) -> Config:
    """Read a configuration file. Raises ConfigError."""
    check(os.path.isfile(source), "--config", source, "No such file.")
    try:
        document = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("--config", source, f"It cannot be read: {error.strerror}.") from None
    except Exception as error:  # beside YAMLError, what Python's conversions raise for `2001-99-99`, `!!bool x`, too deep nesting
        line = " ".join(str(error).split())[:300]
        raise ConfigError("--config", source, f"It is not valid YAML: {type(error).__name__}: {line}.") from None
    check(isinstance(document, dict), "--config", source, "The file must be a mapping with at least serve.")
    return parse(document)
