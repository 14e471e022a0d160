"""Continuous batching gives what plain generation gives, whatever runs beside it."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path

import pytest
import torch
from conftest import PROMPT
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatbot.config import EngineConfig
from chatbot.engine.base import Decision, End, Piece, Request
from chatbot.engine.batch import Answer, Batch
from chatbot.engine.cache import IMPLEMENTATION
from chatbot.engine.local import LocalModel
from chatbot.engine.sampling import draw, nucleus
from chatbot.engine.scheduler import Scheduler
from chatbot.engine.text import StopTexts, TextStream
from chatbot.errors import BusyError, NotReadyError, UserError


@pytest.fixture(scope="module")
def reference(models_dir: Path):
    return AutoModelForCausalLM.from_pretrained(models_dir / "0", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(models_dir: Path):
    return AutoModelForCausalLM.from_pretrained(models_dir / "0", dtype=torch.float32, attn_implementation=IMPLEMENTATION).eval()


def answer(prompt: list[int], tokens: int, out: list[int], ends: list[End | Exception], **more) -> Answer:
    return Answer(prompt, tokens, 0, 1, None, frozenset(), out.append, ends.append, **more)


def test_batch_equals_generate(model, reference) -> None:
    """Prompts of all lengths, joining and leaving at different steps, prompts read in parts: token for token as alone."""
    rng = random.Random(3)
    prompts = [[rng.randrange(2, 300) for _ in range(n)] for n in (1, 2, 7, 16, 17, 33, 70, 5, 40, 3)]
    lengths = [rng.randrange(1, 30) for _ in prompts]
    outs, ends = [[] for _ in prompts], []
    batch = Batch(model, streams=3, waiting=20, context=128, prefill=16, graphs=False)
    answers = [answer(p, n, o, ends) for p, n, o in zip(prompts, lengths, outs, strict=True)]
    for step, a in enumerate(answers):
        batch.waiting.append(a)
        for _ in range(step % 4):
            batch.advance()
    while not batch.idle:
        batch.advance()
    for prompt, n, out in zip(prompts, lengths, outs, strict=True):
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert out == expected[0, len(prompt):].tolist()
    assert len(ends) == len(prompts) and all(isinstance(e, End) and e.reason == "length" for e in ends)


def test_cancelled_answers_leave_others_untouched(model, reference) -> None:
    """Rows are moved when an answer is cancelled, also while a prompt is being read."""
    prompts, outs, ends = [[5, 6, 7], [8] * 20, [9, 10, 11, 12], [13] * 60], [[] for _ in range(4)], []
    batch = Batch(model, streams=4, waiting=4, context=128, prefill=16, graphs=False)
    answers = [answer(p, 25, o, ends) for p, o in zip(prompts, outs, strict=True)]
    batch.waiting.extend(answers)
    for _ in range(4):
        batch.advance()
    assert batch.reading is answers[3]
    answers[0].cancelled = True
    while not batch.idle:
        batch.advance()
    for i in (1, 2, 3):
        expected = reference.generate(torch.tensor([prompts[i]]), max_new_tokens=25, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert outs[i] == expected[0, len(prompts[i]):].tolist()
    assert len(ends) == 3 and len(outs[0]) < 25


def test_decision_is_the_models_probability(model, reference) -> None:
    """The decision's probabilities are those of the words' whole token sequences after prompt and answer."""
    ends: list[End | Exception] = []
    words = [[20, 21], [20, 22, 23], [20, 24]]
    batch = Batch(model, streams=2, waiting=2, context=128, prefill=16, graphs=False)
    out: list[int] = []
    batch.waiting.append(answer([5, 6, 7, 8], 6, out, ends, score=lambda tokens: (4, words), words=("yes", "no", "maybe")))
    batch.waiting.append(answer([9, 9], 12, [], []))
    while not batch.idle:
        batch.advance()
    scores = []
    for word in words:
        ids = torch.tensor([[5, 6, 7, 8, *out[:4], *word]])
        with torch.no_grad():
            logits = reference(ids).logits[0].log_softmax(-1)
        scores.append(sum(logits[8 + i - 1, t] for i, t in enumerate(word)))
    expected = torch.stack(scores).softmax(0).tolist()
    assert list(ends[0].decision.values()) == pytest.approx(expected, abs=1e-4)
    assert sum(ends[0].decision.values()) == pytest.approx(1)


def test_failure_ends_answers_and_leaves_the_batch_usable(model) -> None:
    batch = Batch(model, streams=2, waiting=2, context=64, prefill=16, graphs=False)
    ends: list[End | Exception] = []
    batch.waiting.append(answer([10**6], 3, [], ends))
    with pytest.raises(IndexError):
        batch.advance()
    assert isinstance(ends[0], Exception) and batch.idle
    batch.waiting.append(answer([3], 3, [], ends))
    while not batch.idle:
        batch.advance()
    assert isinstance(ends[1], End)


def test_sampling_draws_from_the_nucleus() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04])
    assert nucleus(probabilities, 0.7)[1].tolist() == [0, 1]
    assert nucleus(probabilities, 0.8)[1].tolist() == [0, 1]
    assert nucleus(probabilities, 0.81)[1].tolist() == [0, 1, 2]
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(probabilities.log(), 1.0, 0.75, generator) for _ in range(2000)]
    assert set(drawn) == {0, 1} and drawn.count(0) / 2000 == pytest.approx(0.625, abs=0.04)
    assert draw(probabilities.log(), 0, 1, None) == 0


def test_nucleus_beyond_the_candidates() -> None:
    """A flat distribution needs more tokens than are looked at first."""
    assert len(nucleus(torch.full((5000,), 1 / 5000), 0.9)[1]) == pytest.approx(4500, abs=2)


def test_text_stream_never_cuts_a_character(models_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "0")
    text = "µg/m² of β-blocker — 维生素 😀 ok"
    stream, pieces = TextStream(tokenizer), []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        pieces.append(stream.push(token))
    assert "".join(pieces) + stream.finish() == text and not any("\ufffd" in p for p in pieces)


def test_stop_texts_are_held_back() -> None:
    stops = StopTexts(("###", "END"))
    shown = "".join(stops.push(c) for c in "a # b ## c EN d ###e END")
    assert shown == "a # b ## c EN d " and stops.found and stops.finish() == ""
    stops = StopTexts(("###",))
    assert stops.push("a ##") == "a " and stops.finish() == "##"


def local(models_dir: Path, **engine) -> LocalModel:
    settings = {"streams": 2, "waiting": 1, "context": 128, "threads": 1, "device": "cpu", **engine}
    return LocalModel.load_directory(models_dir / "0", Scheduler(), EngineConfig(**settings))


async def test_stream_and_close(models_dir: Path) -> None:
    """Pieces come one by one; closing the iterator frees the row; too long and too many are refused."""
    model = local(models_dir)
    parts = model.stream(Request("Does it work?", max_tokens=8))
    got = [p async for p in parts]
    assert isinstance(got[-1], End) and got[-1].tokens <= 8 and all(isinstance(p, Piece) for p in got[:-1])
    with pytest.raises(UserError, match="too long"):
        await anext(model.stream(Request("word " * 400)))
    streams = [model.stream(Request(f"question {i}", max_tokens=100)) for i in range(3)]
    waiting = [asyncio.create_task(anext(s)) for s in streams]
    await asyncio.sleep(0.05)
    with pytest.raises(BusyError):
        await anext(model.stream(Request("one too many")))
    await asyncio.gather(*waiting)
    for s in streams:
        await s.aclose()
    for _ in range(100):
        if model.batch.idle:
            break
        await asyncio.sleep(0.02)
    assert model.batch.idle
    await model.close()
    with pytest.raises(NotReadyError):
        await anext(model.stream(Request("gone")))
    model.scheduler.stop()


async def test_closing_the_model_ends_running_answers(models_dir: Path) -> None:
    model = local(models_dir, context=512)
    stream = model.stream(Request("question", max_tokens=400, temperature=1.0))
    await anext(stream)
    await model.close()
    with pytest.raises(NotReadyError):
        async for _ in stream:
            pass
    model.scheduler.stop()


async def test_decision_replaces_the_one_in_the_answer(models_dir: Path) -> None:
    """An answer that already ends with a decision is scored in its place, not after it."""
    model = local(models_dir)
    decision = Decision(PROMPT["decision"]["prefix"], tuple(PROMPT["decision"]["words"]))
    tokenizer = model.tokenizer
    tokens = tokenizer("The patients improved.\nDecision: yes", add_special_tokens=False).input_ids
    kept, continuations = model._score(decision, [*tokens, 1])
    for word, continuation in zip(decision.words, continuations, strict=True):
        assert tokenizer.decode([*tokens[:kept], *continuation]) == f"The patients improved.\nDecision: {word}"
    model.scheduler.stop()


async def test_seed_repeats(models_dir: Path) -> None:
    model = local(models_dir)

    async def text() -> str:
        request = Request("question", max_tokens=20, temperature=1.0, top_p=0.9, seed=7)
        return "".join([p.text async for p in model.stream(request) if isinstance(p, Piece)])

    assert await text() == await text()
    model.scheduler.stop()


def test_no_thread_is_left(models_dir: Path) -> None:
    scheduler = Scheduler()
    scheduler.stop()
    assert not any(t.name == "scheduler" and t is scheduler._thread for t in threading.enumerate())
