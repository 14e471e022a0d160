"""Loads a model directory: safetensors stay where they are and are mapped into memory, nothing is copied or converted."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatbot.engine.cache import IMPLEMENTATION
from chatbot.errors import UserError

log = logging.getLogger(__name__)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(wanted: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device. Raises UserError if a GPU is wanted and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device: cuda is wanted, but PyTorch sees no GPU. Check the device plugin, or set engine.device: auto.")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def set_threads(threads: int) -> None:
    """CPU threads of the arithmetic; 0 takes the cores that this process may use (container limits are not seen by torch)."""
    torch.set_num_threads(threads or allowed_cores())


def allowed_cores() -> int:
    """Cores of this process: its affinity, bounded by the cgroup's quota (version 1 or 2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text().strip()
            period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return cores
    if quota in ("max", "-1"):
        return cores
    return max(1, min(cores, -(-int(quota) // int(period))))


def give_back() -> None:
    """Return freed memory to the system: what loading took for a while, or a model that is no longer served.

    glibc keeps freed blocks in its heaps otherwise, and a container's limit counts them. Other C libraries have no such call.
    """
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def load_tokenizer(directory: Path, gguf_file: str = "") -> Any:
    """The tokenizer of a model directory. Raises UserError."""
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **extra)
    except Exception as error:
        raise UserError(f"{directory} has no tokenizer that can be read ({error}). Export the run again.") from error


def load_model(directory: Path, device: torch.device, precision: str, gguf_file: str = "") -> Any:
    """A causal language model of a directory, for inference, with the attention of `cache`. Raises UserError.

    With `precision` auto a GPU computes in bfloat16 and a CPU in float32; float32 files on a CPU (bfloat16 files on a CPU with
    `bfloat16`) are used in place from the page cache, which several processes share.
    """
    # Never a pickle (*.bin): loading one can run code.
    extra: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    if precision in ("int8", "int4"):
        if device.type != "cuda":
            raise UserError(f"engine.precision: {precision} needs a GPU; there is none. Set engine.precision: auto.")
        from transformers import BitsAndBytesConfig
        extra["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True) if precision == "int8" else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        dtype = torch.bfloat16
    elif precision == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    else:
        dtype = PRECISIONS[precision]
    if device.type == "cuda":
        extra["device_map"] = {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True, trust_remote_code=False,
                                                     attn_implementation=IMPLEMENTATION, **extra)
    except Exception as error:
        raise UserError(f"The model in {directory} cannot be loaded: {error}") from error
    if getattr(model.config, "sliding_window", None):
        raise UserError(f"The model in {directory} attends through a sliding window; this engine serves models with full attention. "
                        "Use engine.kind: openai with an endpoint that serves it.")
    return model.eval().requires_grad_(False)
