"""Speed of the chatbot's engine: time to first token and tokens/s at 1, 4 and 16 streams, against plain `generate` in a loop.

    python benchmarks/chatbot.py --model DIRECTORY [--gguf FILE] [--device cpu] [--tokens 64] [--streams 1 4 16] [--threads 2]

Both sides answer the same prompts (research questions, each with an abstract of about 150 tokens) greedily with the same number of
tokens, with the same weights and precision. Plain `generate` answers one after another, as a page without batching does: its time to first
token for n streams is the mean over n people who ask at once. `--repeat` runs are interleaved and the best of each is printed (the
machine may be shared).
The result is one JSON object on stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gguf", default="")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
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
