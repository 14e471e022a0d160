"""Which run is served, when it changes, and when nothing can be asked."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import weakref
from pathlib import Path

import pytest
from conftest import PROMPT, Running, Storage, make_config
from transformers import AutoTokenizer

from chatbot import config as configs
from chatbot.errors import ConfigError, UserError
from chatbot.serving import manifest, prompt, service
from chatbot.serving.prompt import Turn
from chatbot.serving.runs import latest, resolve
from trainer import files


async def until(condition) -> None:
    for _ in range(400):
        if await condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not come about in 20 s")


async def test_promotion_while_people_stream(storage: Storage, tmp_path: Path) -> None:
    """A stream that runs when a newer run appears ends whole on the old model; the next question is answered by the new one."""
    storage.add("first-0000000001", seed=0)
    async with Running(make_config(storage, tmp_path, engine={"context": 512})) as app:
        await app.ready()
        body = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 400, "stop": ["never"], "temperature": 0}
        alone = (await app.client.post("/v1/chat/completions", json=body)).json()
        stream = asyncio.create_task(app.client.post("/v1/chat/completions", json={**body, "stream": True}))
        await asyncio.sleep(0.05)
        storage.add("second-000000002", seed=1)

        async def moved() -> bool:
            return (await app.client.get("/readyz")).json()["state"] == "serving second-000000002"

        await until(moved)
        events = [json.loads(line[6:]) for line in (await stream).text.splitlines() if line.startswith("data: {")]
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == alone["choices"][0]["message"]["content"]
        assert events[-1]["attribution"]["run"] == "first-0000000001"
        after = (await app.client.post("/v1/chat/completions", json=body)).json()
        assert after["attribution"]["run"] == "second-000000002"
        assert after["choices"][0]["message"]["content"] != alone["choices"][0]["message"]["content"]


async def test_a_model_that_is_no_longer_served_is_freed(storage: Storage, tmp_path: Path) -> None:
    storage.add("first-0000000001", seed=0)
    async with Running(make_config(storage, tmp_path, serve={"base": True})) as app:
        await app.ready()
        service = app.app.conversation.service
        old = [weakref.ref(m.batch.model) for m in (service.current.tuned, service.current.base)]
        await app.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 4})
        storage.add("second-000000002", seed=1)

        async def freed() -> bool:
            gc.collect()
            return service.current.run.id == "second-000000002" and not any(model() for model in old)

        await until(freed)  # with nobody asking anything in between


async def test_not_ready_until_a_run_is_finished_and_while_it_is_gone(storage: Storage, tmp_path: Path) -> None:
    async with Running(make_config(storage, tmp_path)) as app:
        await asyncio.sleep(0.2)
        waiting = await app.client.get("/readyz")
        assert waiting.status_code == 503 and "No finished run" in waiting.json()["state"]
        assert (await app.client.post("/ask", json={"question": "Why?"})).status_code == 503
        assert (await app.client.get("/healthz")).status_code == 200
        storage.add("demo-0123456789", finished=False)
        await asyncio.sleep(0.3)
        assert (await app.client.get("/readyz")).status_code == 503
        storage.finish("demo-0123456789")
        await app.ready()
        model = storage.root / "runs" / "demo-0123456789" / "model"
        model.rename(model.with_name("away"))

        async def gone() -> bool:
            return (await app.client.get("/readyz")).status_code == 503

        await until(gone)
        assert "vanished" in (await app.client.get("/readyz")).json()["state"]
        assert (await app.client.post("/ask", json={"question": "Why?"})).status_code == 503
        model.with_name("away").rename(model)
        await app.ready()
        assert (await app.client.post("/ask", json={"question": "Why?", "max_tokens": 2})).status_code == 200


async def test_not_ready_while_the_storage_stands_still(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that hangs (NFS without its server), then ends: the same model answers again, by itself."""
    monkeypatch.setattr(service, "PATIENCE_S", 0.3)
    storage.add("demo-0123456789")
    async with Running(make_config(storage, tmp_path)) as app:
        await app.ready()
        manifest_file = storage.root / "runs" / "demo-0123456789" / "model" / manifest.MANIFEST
        kept = manifest_file.rename(manifest_file.with_name("kept"))
        os.mkfifo(manifest_file)  # opening it for reading waits for a writer

        async def still() -> bool:
            return "has not answered for" in (await app.client.get("/readyz")).json()["state"]

        await until(still)
        assert (await app.client.get("/readyz")).status_code == 503
        assert (await app.client.get("/healthz")).status_code == 200
        assert (await app.client.post("/ask", json={"question": "Why?"})).status_code == 503
        with open(manifest_file, "wb") as answer:
            answer.write(kept.read_bytes())
            kept.rename(manifest_file)
        await app.ready()
        assert (await app.client.post("/ask", json={"question": "Why?", "max_tokens": 2})).status_code == 200
        assert app.app.conversation.service.current.run.id == "demo-0123456789"


async def test_a_changed_file_is_refused(storage: Storage, tmp_path: Path) -> None:
    """Same size, other content: the sha256 differs, and the model is not served."""
    storage.add("demo-0123456789")
    weights = storage.root / "runs" / "demo-0123456789" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    async with Running(make_config(storage, tmp_path)) as app:
        async def said() -> bool:
            return "not what was exported" in (await app.client.get("/readyz")).json()["state"]

        await until(said)
        assert (await app.client.get("/readyz")).status_code == 503


def test_the_named_run_and_digest(storage: Storage, tmp_path: Path) -> None:
    digest = storage.add("demo-0123456789")
    storage.add("newer-0123456789", seed=1)
    assert latest(storage.root).id == "newer-0123456789"
    exact = make_config(storage, tmp_path, serve={"follow": "none", "run": "demo-0123456789", "sha256": digest}).serve
    assert resolve(storage.root, exact).digest == digest
    wrong = make_config(storage, tmp_path, serve={"follow": "none", "run": "newer-0123456789", "sha256": digest}).serve
    with pytest.raises(UserError, match="Promote the run again"):
        resolve(storage.root, wrong)


def test_the_trainers_digest(storage: Storage) -> None:
    """Both packages name the same model alike, and a new model card changes nothing."""
    digest = storage.add("demo-0123456789")
    model = storage.root / "runs" / "demo-0123456789" / "model"
    read = manifest.read(model)
    assert read is not None and manifest.directory_digest(read) == files.directory_digest(read) == digest
    with_card = {"files": {**read["files"], "README.md": {"size": 5, "sha256": "0" * 64}}}
    assert manifest.directory_digest(with_card) == files.directory_digest(with_card) == digest


def test_prompts_are_the_runs_own(models_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "0")
    (tmp_path / "prompt.json").write_text(json.dumps(PROMPT))
    form = prompt.load(tmp_path)
    turns = [Turn("user", "first"), Turn("assistant", "x"), Turn("user", "Is {context} {braces} kept?")]
    assert form.render(turns, "An abstract with {question}.", tokenizer) == (
        "### Context:\nAn abstract with {question}.\n\n### Question:\nIs {context} {braces} kept?\n\n### Answer:\n")
    assert form.render([Turn("user", "a</s>b</<s>s>c<s>")], "", tokenizer) == "### Question:\nabc\n\n### Answer:\n"
    (tmp_path / "prompt.json").write_text(json.dumps({**PROMPT, "with_context": None}))
    with pytest.raises(UserError, match="no context"):
        prompt.load(tmp_path).render(turns, "An abstract.", tokenizer)
    (tmp_path / "prompt.json").write_text('{"format": "x"}')
    with pytest.raises(UserError, match="Export the run again"):
        prompt.load(tmp_path)


def test_without_prompt_json_the_chat_template_is_used(models_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "0")
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
    assert prompt.load(tmp_path).render(turns, "", tokenizer) == "[user] a\n[assistant] b\n[user] c\n[assistant] "


@pytest.mark.parametrize("document, field", [
    ({}, "serve"), ({"serve": {"run": "Bad Name"}}, "serve.run"), ({"serve": {"follow": "latest", "run": "a"}}, "serve.run"),
    ({"serve": {"follow": "latest"}, "engine": {"streams": 0}}, "engine.streams"),
    ({"serve": {"follow": "latest"}, "engine": {"kind": "openai"}}, "engine.url"),
    ({"serve": {"follow": "latest"}, "access": {"mode": "proxy"}}, "access.trusted"),
    ({"serve": {"follow": "latest"}, "access": {"trusted": ["nowhere"]}}, "access.trusted[0]"),
    ({"serve": {"follow": "latest"}, "unknown": 1}, "unknown"), ({"serve": {"follow": "sometimes"}}, "serve.follow")])
def test_wrong_configurations_name_the_field(document: dict, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.parse(document)
    assert caught.value.field == field and caught.value.remedy


@pytest.mark.parametrize("files", [
    None, [], {"../models/base/config.json": {"size": 1, "sha256": ""}}, {"/etc/hostname": {"size": 1, "sha256": ""}},
    {"a.txt": {"size": 4}}, {"a.txt": {"size": 4.0, "sha256": ""}}, {"a.txt": 4}, {"a\x00": {"size": 4, "sha256": ""}},
    {".": {"size": 4096, "sha256": ""}},
])
def test_a_manifest_that_lies_is_not_whole(tmp_path: Path, files: object) -> None:
    """Found by tests/fuzz/chatbot/test_fuzz_api.py, or of that kind."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    assert manifest.read(tmp_path) is None
    (tmp_path / "manifest.json").write_text("[" * 9000)
    assert manifest.read(tmp_path) is None
