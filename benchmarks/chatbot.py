"""Speed of the chatbot's engine: time to first token and tokens/s at 1, 4 and 16 streams, against plain `generate` in a loop.

    python benchmarks/chatbot.py --model DIRECTORY [--gguf FILE] [--device cpu] [--tokens 64] [--streams 1 4 16] [--threads 2]

Both sides answer the same prompts (research questions, each with an abstract of about 150 tokens) greedily with the same number of
tokens, with the same weights and precision. Plain `generate` answers one after another, as a page without batching does: its time to first
token for n streams is the mean over n people who ask at once. `--repeat` runs are interleaved and the best of each is printed (the
machine may be shared).

    python benchmarks/chatbot.py --storage DIRECTORY --minutes 30 [--users 4] [--tokens 64] [--threads 2]

With `--minutes` the whole chatbot is started on a loopback port with the newest finished run of a storage, and so many users ask it one
question after another over HTTP, streamed. Its memory is sampled, errors are counted; the exit code is 1 if an answer failed or if the
anonymous memory of the last third is more than 5 % (and 32 MiB) above that of the second.

The result is one JSON object on stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from chatbot.config import EngineConfig
from chatbot.engine.base import End, Request
from chatbot.engine.loading import load_tokenizer, pick_device, set_threads
from chatbot.engine.local import LocalModel
from chatbot.engine.scheduler import Scheduler

TOPICS = ["vitamin D", "aspirin", "early mobilisation", "statins", "probiotics", "telemedicine", "exercise", "metformin"]
ABSTRACT = ("We studied the effect of {topic} in a randomised trial of 412 adults over twelve months. The primary outcome was the number "
            "of hospital admissions; secondary outcomes were quality of life, adverse events and costs. Participants were assigned to the "
            "intervention or to usual care, and assessors were blinded. Admissions were lower in the intervention group (relative risk "
            "0.81, 95% confidence interval 0.68 to 0.97), quality of life did not differ, and adverse events were rare in both groups. ")


def prompts(count: int) -> list[str]:
    """`count` different prompts."""
    return [f"### Context:\n{ABSTRACT.format(topic=TOPICS[i % len(TOPICS)])}\n\n### Question:\nDoes {TOPICS[i % len(TOPICS)]} reduce "
            f"admissions ({i})?\n\n### Answer:\n" for i in range(count)]


class FirstToken(BaseStreamer):
    """Notes when `generate` gives its first token (its first call is the prompt)."""

    def __init__(self) -> None:
        self.calls, self.at = 0, 0.0

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def plain(model: Any, tokenizer: Any, texts: list[str], tokens: int) -> dict[str, float]:
    """All prompts one after another with `generate`."""
    began, firsts = time.perf_counter(), []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
        streamer = FirstToken()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                             streamer=streamer, pad_token_id=0)
        assert out.shape[1] == ids.shape[1] + tokens
        firsts.append(streamer.at - began)
    total = time.perf_counter() - began
    return {"tokens_per_second": len(texts) * tokens / total, "first_token_seconds": statistics.mean(firsts), "seconds": total}


async def batched(model: LocalModel, texts: list[str], tokens: int) -> dict[str, float]:
    """All prompts at once through the engine's own streams."""
    model.ends = set()  # exactly `tokens` tokens, as on the other side

    async def one(text: str) -> End:
        async for part in model.stream(Request(text, special_tokens=False, max_tokens=tokens)):
            if isinstance(part, End):
                return part
        raise AssertionError("no end")

    began = time.perf_counter()
    ends = await asyncio.gather(*map(one, texts))
    total = time.perf_counter() - began
    assert all(e.tokens == tokens for e in ends)
    return {"tokens_per_second": len(texts) * tokens / total,
            "first_token_seconds": statistics.mean(e.first for e in ends), "seconds": total}


def memory(pid: int) -> dict[str, int]:
    """Resident and anonymous memory of a process, bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return {"resident": kilobytes["Rss"] * 1024, "anonymous": kilobytes["Anonymous"] * 1024}


async def user(client: httpx.AsyncClient, number: int, until: float, tokens: int, seen: dict[str, Any]) -> None:
    """Asks one question after another until the time is up: every second one with an abstract (if the run's format has one), every fifth
    of the base model (if it is loaded)."""
    for asked in range(sys.maxsize):
        if time.monotonic() >= until:
            return
        topic = TOPICS[(number + asked) % len(TOPICS)]
        messages = [{"role": "user", "content": f"Does {topic} reduce admissions ({number}, {asked})?"}]
        body = {"messages": messages, "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
        if seen["context"] and asked % 2:
            body["context"] = ABSTRACT.format(topic=topic)
        if seen["base"] and asked % 5 == 4:
            body["model"] = "base"
        began, first, used, done = time.perf_counter(), 0.0, 0, False
        try:
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise ValueError(f"status {answer.status_code}: {(await answer.aread())[:200]!r}")
                async for line in answer.aiter_lines():
                    done = done or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        if not first and any(c["delta"].get("content") for c in event["choices"]):
                            first = time.perf_counter() - began
                        used = (event.get("usage") or {}).get("completion_tokens", used)
            if not done or not used:
                raise ValueError("the stream ended early")
            seen["answers"] += 1
            seen["tokens"] += used
            seen["first"].append(first or time.perf_counter() - began)
        except (httpx.HTTPError, ValueError) as error:
            seen["errors"].append(f"{type(error).__name__}: {error}"[:300])
            await asyncio.sleep(1)


async def users(url: str, pid: int, args: argparse.Namespace, context: bool) -> dict[str, Any]:
    """All users at once, with samples of the server's memory."""
    began = time.monotonic()
    until = began + args.minutes * 60
    seen: dict[str, Any] = {"answers": 0, "tokens": 0, "first": [], "errors": [], "base": args.base,
                            "context": context}
    samples: list[dict[str, float]] = []
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        asking = [asyncio.create_task(user(client, n, until, args.tokens, seen)) for n in range(args.users)]
        while not all(task.done() for task in asking):
            samples.append({"seconds": time.monotonic() - began, **memory(pid)})
            await asyncio.wait(asking, timeout=max(1.0, args.minutes * 60 / 360))
        await asyncio.gather(*asking)
    third = len(samples) // 3
    middle, last = (statistics.mean(s["anonymous"] for s in part) for part in (samples[third:2 * third], samples[2 * third:]))
    first = sorted(seen["first"])
    seconds = time.monotonic() - began
    return {"minutes": seconds / 60, "users": args.users, "answers": seen["answers"],
            "errors": len(seen["errors"]), "first_errors": seen["errors"][:5],
            "tokens_per_second": seen["tokens"] / seconds,
            "first_token_seconds": {"median": statistics.median(first), "p95": first[int(len(first) * 0.95)],
                                    "max": first[-1]} if first else None,
            "memory_mib": {"anonymous_start": samples[0]["anonymous"] / 2**20, "anonymous_second_third": middle / 2**20,
                           "anonymous_last_third": last / 2**20, "resident_max": max(s["resident"] for s in samples) / 2**20},
            "flat": last <= max(middle * 1.05, middle + 32 * 2**20)}


def load_test(args: argparse.Namespace) -> int:
    """Start the chatbot, let people ask, stop it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory(prefix="chatbot-load-") as folder:
        work = Path(folder)
        (work / "config.yaml").write_text(yaml.safe_dump({
            "storage": str(args.storage.resolve()), "serve": {"follow": "latest", "base": args.base},
            "engine": {"device": args.device, "precision": args.precision, "threads": args.threads, "context": args.context},
            "server": {"host": "127.0.0.1", "port": port, "temporary": str(work / "tmp")}, "records": {"directory": str(work / "records")},
            "guardrails": {"checks": {name: {"enabled": False} for name in ("rate", "repetition", "gibberish")}}}))
        with (work / "log").open("w") as log:
            server = subprocess.Popen([sys.executable, "-m", "chatbot", "serve", "--config", str(work / "config.yaml")], cwd=root,
                                      env={**os.environ, "PYTHONPATH": str(root)}, stdout=log, stderr=log)
        try:
            url, until = f"http://127.0.0.1:{port}", time.monotonic() + 600
            while True:
                if server.poll() is not None or time.monotonic() > until:
                    raise SystemExit("The chatbot did not become ready:\n" + (work / "log").read_text()[-4000:])
                try:
                    if httpx.get(f"{url}/readyz").status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(0.5)
            run = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
            context = bool(json.loads((args.storage / "runs" / run / "model" / "prompt.json").read_text()).get("with_context"))
            result = {"run": run, "threads": args.threads, "tokens": args.tokens, **asyncio.run(users(url, server.pid, args, context))}
        finally:
            server.terminate()
            server.wait(60)
        result["tracebacks"] = (work / "log").read_text().count("Traceback")
    print(json.dumps(result))
    return int(bool(result["errors"] or result["tracebacks"] or not result["flat"]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="model directory (speed)")
    parser.add_argument("--storage", type=Path, help="shared storage with runs/ (load)")
    parser.add_argument("--minutes", type=float, default=0, help="load instead of speed, for so long")
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--base", action="store_true", help="load the base model beside the tuned one (load)")
    parser.add_argument("--gguf", default="")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    if bool(args.minutes) != bool(args.storage) or bool(args.minutes) == bool(args.model):
        parser.error("Give --model for speed, or --storage and --minutes for load.")
    if args.minutes:
        sys.exit(load_test(args))
    set_threads(args.threads)
    config = EngineConfig(device=args.device, precision=args.precision, streams=max(args.streams), context=args.context,
                          threads=args.threads)
    engine = LocalModel.load_directory(args.model, Scheduler(), config, args.gguf)
    device = pick_device(args.device)
    # The same weights, attended to by transformers' own fast attention.
    weights = engine.batch.model
    reference = AutoModelForCausalLM.from_config(weights.config, attn_implementation="sdpa", dtype=weights.dtype).to("meta")
    reference.load_state_dict(engine.batch.model.state_dict(), assign=True)
    reference.tie_weights()
    for name, buffer in engine.batch.model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(reference.get_submodule(owner), leaf, buffer)
    reference.eval()
    tokenizer = load_tokenizer(args.model, args.gguf)
    result: dict[str, Any] = {"model": args.model.name,
                              "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                              "threads": torch.get_num_threads(),
                              "dtype": str(engine.batch.model.dtype), "tokens": args.tokens, "streams": {}}
    plain(reference, tokenizer, prompts(1), 8)
    asyncio.run(batched(engine, prompts(max(args.streams)), 8))
    for count in args.streams:
        ours, theirs = [], []
        for _ in range(args.repeat):
            ours.append(asyncio.run(batched(engine, prompts(count), args.tokens)))
            theirs.append(plain(reference, tokenizer, prompts(count), args.tokens))
        best, other = (max(runs, key=lambda r: r["tokens_per_second"]) for runs in (ours, theirs))
        result["streams"][str(count)] = {"engine": best, "generate": other, "ratio": best["tokens_per_second"] / other["tokens_per_second"]}
        print(f"{count:3} streams: {best['tokens_per_second']:7.1f} tokens/s, first after {best['first_token_seconds']:6.2f} s;  generate: "
              f"{other['tokens_per_second']:7.1f} tokens/s, first after {other['first_token_seconds']:6.2f} s;  "
              f"{result['streams'][str(count)]['ratio']:.2f}x", file=sys.stderr)
    engine.scheduler.stop()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
