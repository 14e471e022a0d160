"""A run on a storage of its own: a tiny random Llama, a small byte-level tokenizer, manifest, prompt, report."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chatbot import config as configs

TEXT = ["Does vitamin D reduce respiratory infections? yes no maybe", "The study showed that patients improved.",
        "Answer the question.\n\n### Question:\n### Context:\n### Answer:\nDecision: yes"]
PROMPT = {"format": "instruction", "with_context": "### Context:\n{context}\n\n### Question:\n{question}\n\n### Answer:\n",
          "without_context": "### Question:\n{question}\n\n### Answer:\n", "chat": False, "add_special_tokens": False, "stop": ["</s>"],
          "decision": {"prefix": "\nDecision: ", "words": ["yes", "no", "maybe"]}}


def write_manifest(directory: Path) -> str:
    """manifest.json as the trainer writes it; returns the model's digest."""
    files = {p.relative_to(directory).as_posix(): {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
             for p in sorted(directory.rglob("*")) if p.is_file() and p.name != "manifest.json"}
    (directory / "manifest.json").write_text(json.dumps({"files": files, "step": 3}))
    return hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def make_model(directory: Path, seed: int) -> None:
    """Weights and tokenizer; greedy answers never end by themselves."""
    directory.mkdir(parents=True)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(TEXT * 4, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"],
                                                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(directory)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192, bos_token_id=0,
                                         eos_token_id=1, initializer_range=0.2))
    # The end never has the highest logit (another is above 0): greedy answers are as long as they are asked to be.
    model.lm_head.weight.data[1] = 0
    model.save_pretrained(directory)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, made once."""
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        make_model(root / str(seed), seed)
    return root


class Storage:
    """A shared storage with runs."""

    def __init__(self, root: Path, models: Path) -> None:
        self.root, self.models = root, models
        (root / "runs").mkdir()
        shutil.copytree(models / "1", root / "models" / "base")

    def add(self, run: str, seed: int = 0, prompt: dict[str, Any] | None = PROMPT, finished: bool = True) -> str:
        """Add a run; returns its model's digest."""
        root = self.root / "runs" / run
        shutil.copytree(self.models / str(seed), root / "model")
        if prompt is not None:
            (root / "model" / "prompt.json").write_text(json.dumps(prompt))
        digest = write_manifest(root / "model")
        (root / "run.yaml").write_text("run: {name: demo, model: {path: models/base}, data: {sample: true}}")
        if finished:
            self.finish(run)
        return digest

    def finish(self, run: str) -> None:
        """Write the run's report."""
        root = self.root / "runs" / run
        (root / "report.html").write_text("<h1>Report</h1><script>parent.x = 1</script>")
        (root / "report.json").write_text(json.dumps({
            "run": run, "base": {"loss": 3.0, "perplexity": 20.1}, "tuned": {"loss": 2.0, "perplexity": 7.4}}))


@pytest.fixture
def storage(tmp_path: Path, models_dir: Path) -> Storage:
    root = tmp_path / "storage"
    root.mkdir()
    return Storage(root, models_dir)


def make_config(storage: Storage, tmp_path: Path, **parts: Any) -> configs.Config:
    """A configuration for tests: small, quick to notice changes."""
    document = {"storage": str(storage.root), "serve": {"follow": "latest", "every_seconds": 0.1},
                "engine": {"streams": 4, "waiting": 4, "context": 256, "threads": 1, "device": "cpu"},
                "server": {"temporary": str(tmp_path / "tmp")}, "records": {"directory": str(tmp_path / "records")},
                "guardrails": {"checks": {"rate": {"per_minute": 6000, "burst": 1000}, "gibberish": {"enabled": False},
                                          "repetition": {"enabled": False}}}}
    for name, part in parts.items():
        document[name] = {**document.get(name, {}), **part} if isinstance(part, dict) else part
    return configs.parse(document)


class Running:
    """The application with its lifespan running, and a client."""

    def __init__(self, config: configs.Config, address: str = "10.0.0.9") -> None:
        from chatbot.app import make_app
        self.app, self.address = make_app(config), address

    async def __aenter__(self) -> Running:
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._said: asyncio.Queue[Any] = asyncio.Queue()
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self._task = asyncio.create_task(self.app(scope, self._events.get, self._said.put))
        await self._events.put({"type": "lifespan.startup"})
        said = await self._said.get()
        assert said["type"] == "lifespan.startup.complete", said
        self.client = self.connect()
        return self

    def connect(self, address: str = "") -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app, client=(address or self.address, 1)), base_url="http://chatbot",
                                 timeout=60)

    async def ready(self) -> None:
        """Wait until it can answer."""
        for _ in range(600):
            if (await self.client.get("/readyz")).status_code == 200:
                return
            await asyncio.sleep(0.05)
        raise AssertionError((await self.client.get("/readyz")).text)

    async def __aexit__(self, *_: Any) -> None:
        await self.client.aclose()
        await self._events.put({"type": "lifespan.shutdown"})
        await self._task


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Asynchronous tests run in an event loop of their own, without a mark."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


# The chatbot as a process of its own, for a browser. The browser's driver has its packages in the tools' environment.
TOOLS = Path(os.environ.get("LLM_FINETUNE_TOOLS_PYTHON") or Path.home() / ".cache/llm-finetune/venv/tools/bin/python")
CHROMIUM = Path("/usr/bin/chromium")
in_a_browser = pytest.mark.skipif(not (TOOLS.exists() and CHROMIUM.exists()), reason=f"needs {TOOLS} with playwright, and {CHROMIUM}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def serving(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The chatbot as a process of its own, ready: (its URL, the process). A port and a temporary folder are added to the configuration.

    It writes `folder`/log, and must end in order.
    """
    port, root, log_file = free_port(), Path(__file__).parents[2], folder / "log"
    document = {**config, "server": {**config.get("server", {}), "port": port, "temporary": str(folder / "tmp")}}
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    with log_file.open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "chatbot", "serve", "--config", str(folder / "config.yaml")], cwd=root,
                                  env={**os.environ, "PYTHONPATH": str(root)}, stdout=log, stderr=log)
        try:
            url, until = f"http://127.0.0.1:{port}/", time.monotonic() + 300
            while True:
                assert server.poll() is None and time.monotonic() < until, log_file.read_text()
                try:
                    if httpx.get(f"{url}readyz").status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(0.3)
            yield url, server
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == -signal.SIGTERM  # uvicorn ends in order, then lets the signal have its way


def browse(folder: Path, config: dict[str, Any], driver: str, *arguments: Any, timeout_s: float) -> dict[str, Any]:
    """Serve with a configuration, and run a driver of this folder as `driver URL arguments`; returns what it saw (it prints JSON)."""
    with serving(folder, config) as (url, _):
        done = subprocess.run([TOOLS, Path(__file__).with_name(driver), url, *arguments], capture_output=True, text=True,
                              timeout=timeout_s)
        assert done.returncode == 0, done.stderr + (folder / "log").read_text()
    return dict(json.loads(done.stdout))
