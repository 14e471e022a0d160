"""How fast a checkpoint becomes a model directory: adapters merged into a base model on disk, and a full model converted to bfloat16.

    python benchmarks/export.py --model 1b --threads 1 4            # both on this machine, in turns
    python benchmarks/export.py --model 70b --layers 10 --methods lora --out results.jsonl

Base model and checkpoint are made up and written first (not timed); both are in the page cache. As in a worker, PyTorch has one thread for
each operation; `--threads` is how many tensors are made at once (trainer/export.py has 4). Prints GB/s of the model that is written,
hashes and all, median of the turns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from lifecycle import configuration, make_base
from record import record
from train import MODELS, versions


def base_model(directory: Path, config: Any) -> None:
    """Random bfloat16 weights in safetensors of two layers each, with config.json."""
    import torch
    from safetensors.torch import save_file

    from trainer.files import write_json
    from trainer.model.load import empty_model, model_config

    target = model_config(config)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in empty_model(target, torch.bfloat16).named_parameters():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        file = f"model-{int(layer) // 2:03d}.safetensors" if layer.isdigit() else "model-rest.safetensors"
        files.setdefault(file, {})[name] = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, 0.02)
    for file, tensors in files.items():
        save_file(tensors, directory / file, metadata={"format": "pt"})
    write_json(directory / "model.safetensors.index.json", {"weight_map": {name: file for file, names in files.items() for name in names}})
    target.save_pretrained(directory)


def checkpoint(config: Any) -> dict[str, Any]:
    """What a checkpoint of the configuration's method holds, in float32."""
    import torch

    from trainer.model.load import empty_model, model_config
    from trainer.model.methods import canonical, shape_for_method

    target = model_config(config)
    model = empty_model(target, torch.float32)
    shape_for_method(model, config.run.method, target.vocab_size, torch.float32)
    return {canonical(name): torch.empty(p.shape).normal_(0, 0.02) for name, p in model.named_parameters() if p.requires_grad}


def measure(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """Seconds of an export with each number of threads, in turns."""
    import torch
    from transformers import AutoTokenizer

    import trainer.export
    from trainer import config as configurations
    from trainer.paths import RunPaths

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        storage = Path(folder)
        case = argparse.Namespace(model=options.model, layers=options.layers, method=method, engine="fsdp", gpus=0, steps=16, rate=1e-4)
        document = configuration(case, storage)
        document["run"]["export"] = {"dtype": "bfloat16"}
        made = configurations.parse(document)
        make_base(storage / "models/made")
        base_model(storage / "models/made", made)
        document["run"]["model"].pop("architecture")
        made = configurations.parse(document)
        trained, paths = trainer.export.TensorReader(checkpoint(made)), RunPaths.of(made)
        tokenizer = AutoTokenizer.from_pretrained(storage / "models/made")
        seconds: dict[int, list[float]] = {threads: [] for threads in options.threads}
        for _ in range(options.repeats):
            for threads in options.threads:
                trainer.export.THREADS = threads
                shutil.rmtree(paths.model, ignore_errors=True)
                began = time.perf_counter()
                size = trainer.export.export(made, paths, trained, tokenizer)["bytes"]
                seconds[threads].append(time.perf_counter() - began)
    found = {str(threads): round(size / 1e9 / statistics.median(each), 3) for threads, each in seconds.items()}
    return {"benchmark": "export", "case": {"model": options.model, "layers": options.layers, "method": method, "repeats": options.repeats},
            "bytes": size, "gb_per_second": found, "seconds": {str(t): [round(s, 1) for s in each] for t, each in seconds.items()},
            "cores": len(os.sched_getaffinity(0)), "versions": versions()}


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="1b")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers (0: the model's own)")
    parser.add_argument("--methods", nargs="+", choices=("full", "lora"), default=["lora", "full"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4], help="tensors at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--out", default="")
    return parser


def main() -> None:
    """Measure and print."""
    options = command_line().parse_args()
    for method in options.methods:
        record(measure(options, method), options.out)


if __name__ == "__main__":
    main()
