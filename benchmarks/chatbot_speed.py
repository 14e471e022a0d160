"""Speed of the chatbot's engine: time to first token and tokens/s at 1, 4 and 16 streams, against plain `generate` in a loop.

    python benchmarks/chatbot_speed.py --model DIRECTORY [--gguf FILE] --device cpu --threads 2 --out benchmarks/results/chatbot.jsonl
    python benchmarks/chatbot_speed.py --random 7b --tokens 128 --out benchmarks/results/chatbot.jsonl         # one GPU, under 8 minutes

Both sides answer the same prompts (research questions, each with an abstract of about 150 tokens) greedily with the same number of
tokens, with the same weights in memory and the same precision. Plain `generate` answers one after another, as a page without batching
does: its time to first token for n streams is the mean over n people who ask at once. The runs of both sides take turns, and the median
of each is printed, with the CPU seconds that it took (what a shared machine distorts least). `--random` makes the weights on the spot, of
that architecture, and a tokenizer from the prompts.

The result is one JSON object on stdout; `--out` appends it to a file.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from questions import prompts
from record import record
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from chatbot.config import EngineConfig
from chatbot.engine.base import End, Request
from chatbot.engine.cache import IMPLEMENTATION
from chatbot.engine.loading import PRECISIONS, load_model, load_tokenizer, pick_device, set_threads
from chatbot.engine.local import LocalModel
from chatbot.engine.scheduler import Scheduler

ARCHITECTURES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
}
"""Llama architectures for `--random`; 7b is Llama 2 7B's."""


def random_model(name: str, device: torch.device, precision: str) -> Any:
    """Random weights on the device."""
    dtype = PRECISIONS.get(precision, torch.bfloat16 if device.type == "cuda" else torch.float32)
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **ARCHITECTURES[name])
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, attn_implementation=IMPLEMENTATION, dtype=dtype).eval().requires_grad_(False)


def prompt_tokenizer() -> Any:
    """A byte-level tokenizer trained on the prompts, with about as many tokens a prompt as Llama's."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator(prompts(16), trainers.BpeTrainer(vocab_size=520, special_tokens=["<s>", "</s>"], show_progress=False,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def reference_of(weights: Any) -> Any:
    """The same weights in memory, attended to by transformers' own fast attention."""
    reference = AutoModelForCausalLM.from_config(weights.config, attn_implementation="sdpa", dtype=weights.dtype).to("meta")
    reference.load_state_dict(weights.state_dict(), assign=True)
    reference.tie_weights()
    for name, buffer in weights.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(reference.get_submodule(owner), leaf, buffer)
    return reference.eval()


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
    began, busy, firsts = time.perf_counter(), time.process_time(), []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
        streamer = FirstToken()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                             streamer=streamer, pad_token_id=0)
        assert out.shape[1] == ids.shape[1] + tokens
        firsts.append(streamer.at - began)
    total = time.perf_counter() - began
    return {"tokens_per_second": len(texts) * tokens / total, "first_token_seconds": statistics.mean(firsts), "seconds": total,
            "cpu_seconds": time.process_time() - busy}


async def batched(model: LocalModel, texts: list[str], tokens: int) -> dict[str, float]:
    """All prompts at once through the engine's own streams."""
    model.ends = set()  # exactly `tokens` tokens, as on the other side

    async def one(text: str) -> End:
        async for part in model.stream(Request(text, special_tokens=False, max_tokens=tokens)):
            if isinstance(part, End):
                return part
        raise AssertionError("no end")

    began, busy = time.perf_counter(), time.process_time()
    ends = await asyncio.gather(*map(one, texts))
    total = time.perf_counter() - began
    assert all(e.tokens == tokens for e in ends)
    return {"tokens_per_second": len(texts) * tokens / total,
            "first_token_seconds": statistics.mean(e.first for e in ends), "seconds": total, "cpu_seconds": time.process_time() - busy}


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    """Each figure's median."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="model directory")
    source.add_argument("--random", choices=sorted(ARCHITECTURES), help="random weights of this architecture")
    parser.add_argument("--gguf", default="")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="auto", choices=["auto", *PRECISIONS])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--out", default="")
    return parser


def main() -> None:
    """Measure and print."""
    args = command_line().parse_args()
    set_threads(args.threads)
    device = pick_device(args.device)
    config = EngineConfig(device=args.device, precision=args.precision, streams=max(args.streams), context=args.context,
                          threads=args.threads)
    if args.random:
        weights, tokenizer = random_model(args.random, device, args.precision), prompt_tokenizer()
    else:
        weights, tokenizer = load_model(args.model, device, args.precision, args.gguf), load_tokenizer(args.model, args.gguf)
    reference = reference_of(weights)
    engine = LocalModel(weights, tokenizer, Scheduler(), config)
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in prompts(16)]
    name = args.random or (args.model.parent if args.model.name == "model" else args.model).name  # a run's export is <run>/model
    result: dict[str, Any] = {"model": name,
                              "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                              "threads": torch.get_num_threads() if device.type == "cpu" else None, "torch": torch.__version__,
                              "dtype": str(weights.dtype).removeprefix("torch."), "prompt_tokens": statistics.mean(lengths),
                              "tokens": args.tokens, "repeat": args.repeat, "streams": {}}
    plain(reference, tokenizer, prompts(1), 8)
    for count in args.streams:  # what is recorded and compiled at first use
        asyncio.run(batched(engine, prompts(count), args.tokens if device.type == "cuda" else 4))
    for count in args.streams:
        ours, theirs = [], []
        for _ in range(args.repeat):
            ours.append(asyncio.run(batched(engine, prompts(count), args.tokens)))
            theirs.append(plain(reference, tokenizer, prompts(count), args.tokens))
        mine, other = median(ours), median(theirs)
        ratio = mine["tokens_per_second"] / other["tokens_per_second"]
        result["streams"][str(count)] = {"engine": mine, "generate": other, "ratio": ratio}
        print(f"{count:3} streams: {mine['tokens_per_second']:7.1f} tokens/s, first after {mine['first_token_seconds']:6.2f} s;  generate: "
              f"{other['tokens_per_second']:7.1f} tokens/s, first after {other['first_token_seconds']:6.2f} s;  {ratio:.2f}x",
              file=sys.stderr, flush=True)
    engine.scheduler.stop()
    record(result, args.out)


if __name__ == "__main__":
    main()
