"""What others' loops reach on the same model and rows as `train.py`: the old recipe, and TRL's SFTTrainer.

    python benchmarks/peers.py --peer old --model 3b --rows qa --out results.jsonl
    python benchmarks/peers.py --peer trl --model 3b --rows qca --checkpointing none --out results.jsonl
    python benchmarks/train.py --model 3b --rows qca --out results.jsonl                      # the product, for the ratio

old  Accelerate and DeepSpeed ZeRO-3, the HF model with its default attention and full gradient checkpointing, 32 rows a GPU padded to 512
     tokens, loss on every token, padding included.
trl  SFTTrainer: rows packed best-fit, padding-free, loss on the answers, Liger's kernels, fused AdamW. `--attention packed` is the varlen
     FlashAttention of PyTorch that the product uses too; `sdpa` and `flex_attention` are those of transformers. Weights and optimizer
     state are bf16 unless `--weights float32` (which then trains under autocast, TRL's way to full-precision state).

Tokens that count are real ones: no padding. A step's time is the wall clock between two synchronised ends of steps, the median after
`--warm` steps. TRL is not in the trainer's lock: install `trl liger-kernel` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import record
from train import CONTEXT, MODELS, REPOSITORY, ROWS, VOCABULARY, make_dataset, versions


class Clock:
    """Ends of steps on this rank, the device idle at each."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def tick(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def median(self, warm: int) -> float:
        """Seconds of a step."""
        return statistics.median(b - a for a, b in zip(self.ends[warm:-1], self.ends[warm + 1:], strict=True))


def rows_of(folder: Path, options: argparse.Namespace, tokens: int) -> Any:
    """The rows that `train.py` would train on."""
    from trainer.data.shards import TokenShards

    make_dataset(folder, options.rows, tokens)
    return TokenShards(folder, "train")


def base_model(options: argparse.Namespace, attention: str, dtype: str) -> Any:
    """A randomly initialised Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[options.model], vocab_size=VOCABULARY, max_position_embeddings=4096, use_cache=False)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)


def old(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The old recipe on every rank of the group."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    batch, hidden = options.batch, MODELS[options.model]["hidden_size"]
    zero = {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": hidden * hidden,
            "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden), "stage3_param_persistence_threshold": 10 * hidden}
    plugin = DeepSpeedPlugin(hf_ds_config={"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": batch,
                                           "gradient_accumulation_steps": 1, "zero_optimization": zero,
                                           "steps_per_print": 10**6})
    accelerator = Accelerator(mixed_precision="bf16", deepspeed_plugin=plugin)
    total = batch * CONTEXT * (options.steps + 1) * accelerator.num_processes
    shards = rows_of(scratch / f"rows-{accelerator.process_index}", options, total)
    model = base_model(options, "sdpa", "bfloat16")
    model.gradient_checkpointing_enable()
    model.train()
    engine, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-5))
    clock, real = Clock(), 0
    for step in range(options.steps):
        ids = torch.zeros(batch, CONTEXT, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i in range(batch):
            tokens, _ = shards.row((step * accelerator.num_processes + accelerator.process_index) * batch + i)
            ids[i, :len(tokens)] = torch.from_numpy(np.array(tokens, dtype=np.int64))
            mask[i, :len(tokens)] = 1
        real += int(mask.sum())
        ids, mask = ids.to(accelerator.device), mask.to(accelerator.device)
        loss = engine(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
    seconds = clock.median(options.warm)
    return {"seconds": seconds, "tokens": real / options.steps, "rows": float(batch), "loss": float(loss)}


def trl(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """TRL's trainer on every rank of the group."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from trainer.model import attention  # registers `packed`

    shards = rows_of(scratch / f"rows-{os.environ.get('RANK', '0')}", options, options.pack * (options.steps + 2) * options.gpus)
    rows = [shards.row(i) for i in range(len(shards.lengths))]
    data = Dataset.from_dict({"input_ids": [np.asarray(tokens).tolist() for tokens, _ in rows],
                              "completion_mask": [[0] * start + [1] * (len(tokens) - start) for tokens, start in rows]})
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")),
                                    unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")
    model = base_model(options, attention.PACKED if options.attention == "packed" else options.attention, options.weights)
    clock = Clock()

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    cuda = torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(scratch / "trl"), max_steps=options.steps, per_device_train_batch_size=1, packing=True, packing_strategy="bfd",
        max_length=options.pack, completion_only_loss=True, bf16=cuda, use_cpu=not cuda, optim="adamw_torch_fused", learning_rate=1e-5,
        use_liger_kernel=cuda, gradient_checkpointing=options.checkpointing == "full",
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.checkpointing == "full" else None,
        torch_compile=options.compile, save_strategy="no", report_to="none", logging_steps=max(1, options.steps // 2), disable_tqdm=True)
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=words, callbacks=[Ticks()])
    packs = [sum(lengths) for lengths in trainer.train_dataset["seq_lengths"]]
    per_pack = [len(lengths) for lengths in trainer.train_dataset["seq_lengths"]]
    loss = trainer.train().training_loss
    return {"seconds": clock.median(options.warm), "tokens": statistics.mean(packs), "rows": statistics.mean(per_pack),
            "loss": loss}


def rank(options: argparse.Namespace) -> None:
    """One process of the group; rank 0 writes what it measured."""
    import torch

    result = (old if options.peer == "old" else trl)(options, Path(options.scratch))
    if os.environ.get("RANK", "0") != "0":
        return
    per_second = result["tokens"] / result["seconds"]
    Path(options.scratch, "result.json").write_text(json.dumps({
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "tokens_per_second": round(per_second * options.gpus, 1), "tokens_per_second_per_worker": round(per_second, 1),
        "rows_per_second": round(result["rows"] * options.gpus / result["seconds"], 2), "step_seconds": round(result["seconds"], 5),
        "loss": round(result["loss"], 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if torch.cuda.is_available() else None}))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start the group, and wait for it at most `--timeout` seconds."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        arguments = [f"--{k}={v}" for k, v in vars(options).items() if k not in ("out", "scratch", "log", "timeout", "compile", "rank")]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.gpus}", __file__, "--rank",
                   f"--scratch={folder}", *arguments, *(["--compile"] if options.compile else [])]
        began, log = time.monotonic(), Path(options.log or folder + "/log")
        paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        with open(log, "a") as file:
            try:
                code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=options.timeout, check=False,
                                      env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "4"}).returncode
            except subprocess.TimeoutExpired:
                code = 124
        case = {k: v for k, v in vars(options).items() if k not in ("out", "scratch", "log", "timeout", "rank")}
        result: dict[str, Any] = {"case": case, "exit": code, "wall_seconds": round(time.monotonic() - began, 1)}
        found = Path(folder, "result.json")
        result |= json.loads(found.read_text()) if found.exists() else {"log_end": log.read_text(errors="replace")[-3000:]}
    return result | {"versions": versions("trl", "liger-kernel", "accelerate")}


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("old", "trl"), required=True)
    parser.add_argument("--model", choices=MODELS, default="3b")
    parser.add_argument("--rows", choices=ROWS, default="qca")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="old: rows a GPU and step")
    parser.add_argument("--pack", type=int, default=16384, help="trl: tokens a GPU and step")
    parser.add_argument("--attention", choices=("packed", "sdpa", "flex_attention"), default="packed", help="trl")
    parser.add_argument("--checkpointing", choices=("none", "full"), default="none", help="trl")
    parser.add_argument("--weights", choices=("bfloat16", "float32"), default="bfloat16", help="trl")
    parser.add_argument("--compile", action="store_true", help="trl: torch.compile of the whole model")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warm", type=int, default=4, help="first steps that do not count")
    parser.add_argument("--out", default="")
    parser.add_argument("--log", default="")
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Measure one peer and print it; `--out` appends it to a file."""
    options = command_line().parse_args()
    if options.rank:
        rank(options)
        return
    result = measure(options)
    record(result, options.out)
    sys.exit(result["exit"])


if __name__ == "__main__":
    main()
