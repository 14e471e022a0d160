"""A run's configuration: one YAML file, one run.

The file has four parts. `run` decides the result, and its hash names the run (see tools/runid.py and the finetune-job chart);
`resources` says on what it runs, `storage` where the shared storage is mounted, `id` how the run is called:

    run:       {name: ..., model: {...}, data: {...}, method: {...}, train: {...}, ...}
    resources: {workers: 2, gpus_per_worker: 1, ...}
    storage:   /storage
    id:        pubmedqa-0a1b2c3d4e

Paths inside `run` are relative to the storage, so that the same run has the same hash wherever it is mounted. The JSON schema of
`run` and `resources` is made from these classes (`python -m trainer schema`) and is part of the chart's values.schema.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from trainer.errors import ConfigError

RUN_NAME = re.compile(r"^[a-z]([a-z0-9-]{0,34}[a-z0-9])?$")
"""A run's name: with `-` and the hash's ten digits it stays within KubeRay's 47 characters of a RayJob's name."""
RUN_ID = re.compile(r"^[a-z][a-z0-9-]{0,46}$")
"""A run's id: a name of a RayJob and of a directory (chatbot/config.py has the same)."""
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""A repository of the hub: never a path, neither absolute nor with `..`."""
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff]")

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 1 << 20, 10_000, 32
"""A configuration file's size, its values (a YAML alias counts wherever it is used) and how deep they are nested."""


def check(ok: bool, field: str, value: object, remedy: str) -> None:
    """Raise ConfigError(field, value, remedy) unless `ok`."""
    if not ok:
        raise ConfigError(field, value, remedy)


LIMITS = {"minimum": operator.ge, "exclusiveMinimum": operator.gt, "maximum": operator.le, "exclusiveMaximum": operator.lt}
"""JSON schema's keywords for a number's range, and what each asks of (value, limit)."""


def limited(default: Any, remedy: str, *, minimum: float | None = None, above: float | None = None, maximum: float | None = None,
            below: float | None = None) -> Any:
    """A field whose range is written once: `check_limits` reads it when a configuration is built, trainer/schema.py for the schema."""
    limits = {"minimum": minimum, "exclusiveMinimum": above, "maximum": maximum, "exclusiveMaximum": below}
    return field(default=default, metadata={"remedy": remedy, "limits": {k: v for k, v in limits.items() if v is not None}})


def check_limits(part: Any, where: str) -> None:
    """ConfigError for the first field of a configuration dataclass that is outside its range."""
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        ok = all(LIMITS[keyword](value, limit) for keyword, limit in f.metadata.get("limits", {}).items())
        check(ok, f"{where}.{f.name}" if where else f.name, value, f.metadata.get("remedy", ""))


def check_relative(field: str, value: str) -> None:
    """Paths of a run lie on the shared storage, below its root."""
    path = PurePosixPath(value)
    check(value != "" and not path.is_absolute() and ".." not in path.parts, field, value,
          "Give a path relative to the shared storage, without '..'.")


@dataclass(frozen=True)
class ModelConfig:
    """The base model: exactly one of `name` (hub) and `path` (shared storage)."""

    name: str = ""
    """Hub name, for example `meta-llama/Llama-3.1-8B`. Gated models need HF_TOKEN in the workers' environment (from a Secret)."""
    revision: str = ""
    """Commit of the hub repository; required with `name`, so that a run can be repeated."""
    path: str = ""
    """Directory on the shared storage, relative to its root."""
    gguf_file: str = ""
    """File inside `path` or the repository, if the model is shipped as GGUF (it is dequantised to `dtype`)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the frozen and the computing weights. Optimizer and master weights of a full fine-tune are float32."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Random initialisation instead of loading: fields of transformers' LlamaConfig. For benchmarks and tests; with `path` or
    `name` only the tokenizer is then loaded from there."""
    licence: str = ""
    """Licence of the base model, repeated in the model card."""

    def __post_init__(self) -> None:
        check(bool(self.name) != bool(self.path), "run.model.name", self.name,
              "Set either run.model.name (a hub model) or run.model.path (a directory on the shared storage), not both.")
        if self.name:
            check(bool(HUB_NAME.fullmatch(self.name)), "run.model.name", self.name, "Give a hub name: owner/model.")
            check(bool(re.fullmatch(r"[0-9a-f]{40}", self.revision)), "run.model.revision", self.revision,
                  "Give the 40-digit commit of the model's repository, so that the run can be repeated.")
        if self.path:
            check_relative("run.model.path", self.path)
        if self.gguf_file:
            check_relative("run.model.gguf_file", self.gguf_file)


@dataclass(frozen=True)
class DataConfig:
    """The dataset: exactly one of `name` (hub), `path` (shared storage) and `sample` (the rows shipped with the trainer)."""

    sample: bool = False
    """Use the PubMedQA-format sample that is shipped with the trainer."""
    name: str = ""
    """Hub dataset, for example `qiaojin/PubMedQA`."""
    revision: str = ""
    """Commit of the hub repository; required with `name`."""
    subsets: list[str] = field(default_factory=list)
    """Configurations of the hub dataset, for example `[pqa_artificial, pqa_labeled]`."""
    path: str = ""
    """File or directory on the shared storage: .json (also PubMedQA's published form), .jsonl, .parquet, .csv."""
    columns: dict[str, str] = field(default_factory=dict)
    """Own column names: keys of `id`, `question`, `context`, `answer`, `decision`; values are the file's names."""
    format: Literal["instruction", "tags", "tags-context", "chat"] = "instruction"
    """Prompt: instruction text; START_Q/END_Q START_A/END_A special tokens; the same with START_C/END_C context; the tokenizer's
    chat template."""
    context: bool = True
    """Give the context (the abstract) in the prompt (`tags` never does, `tags-context` always does)."""
    decision: bool = True
    """End the answer with the decision (yes, no, maybe) where the row has one."""
    loss_on: Literal["answer", "all"] = "answer"
    """Tokens that are trained on."""
    max_tokens: int = limited(512, "Give 16 to 1048576 tokens.", minimum=16, maximum=1 << 20)
    """Longest row in tokens; a longer one has its context shortened, never its question or answer."""
    test_share: float = limited(0.2, "Give a share between 0 and 1, both excluded.", above=0, below=1)
    """Share of the rows held out, by a hash of the row's id and the seed (stable under row order)."""
    max_rows: int = limited(0, "Give 0 (all rows) or a positive number.", minimum=0)
    """Use at most this many rows (0: all), chosen by the same hash."""
    exclude_ids: str = ""
    """File on the shared storage with one row id a line that must not be used; PubMedQA's official test ids are always
    excluded when its labelled set is read from the hub or its published form, unless `keep_official_test` is set."""
    keep_official_test: bool = False
    """Do not exclude PubMedQA's 500 official test ids."""
    near_duplicates: float = limited(0.8, "Give a similarity above 0, at most 1.", above=0, maximum=1)
    """Rows of the training split whose word-shingle similarity (Jaccard) to a held-out row is at least this are removed; 1 removes
    exact duplicates only."""
    max_rejected: float = limited(0.05, "Give a share from 0 to 1.", minimum=0, maximum=1)
    """The run stops if more than this share of the rows is rejected (duplicates and exclusions do not count)."""

    def __post_init__(self) -> None:
        check_limits(self, "run.data")
        given = [k for k in ("sample", "name", "path") if getattr(self, k)]
        check(len(given) == 1, "run.data", given, "Set exactly one of run.data.sample, run.data.name and run.data.path.")
        if self.name:
            check(bool(HUB_NAME.fullmatch(self.name)), "run.data.name", self.name,
                  "Give a hub name: owner/dataset. Files on the shared storage are named in run.data.path.")
            for i, subset in enumerate(self.subsets):
                check(bool(re.fullmatch(r"\w[^/\\]*", subset)), f"run.data.subsets[{i}]", subset, "Give the name of a configuration.")
            check(bool(re.fullmatch(r"[0-9a-f]{40}", self.revision)), "run.data.revision", self.revision,
                  "Give the 40-digit commit of the dataset's repository, so that the run can be repeated.")
        if self.path:
            check_relative("run.data.path", self.path)
            check(self.path.endswith((".json", ".jsonl", ".parquet", ".csv")) or "." not in PurePosixPath(self.path).name,
                  "run.data.path", self.path, "Give a .json, .jsonl, .parquet or .csv file, or a directory of such files.")
        if self.exclude_ids:
            check_relative("run.data.exclude_ids", self.exclude_ids)
        known = {"id", "question", "context", "answer", "decision"}
        check(set(self.columns) <= known, "run.data.columns", sorted(set(self.columns) - known), f"Use the keys {sorted(known)}.")


@dataclass(frozen=True)
class MethodConfig:
    """What of the model is trained."""

    kind: Literal["full", "lora", "qlora"] = "full"
    """All weights; low-rank adapters beside frozen weights; the same beside frozen 4-bit (NF4) weights."""
    rank: int = limited(16, "Give a rank from 1 to 4096; 8 to 64 is usual.", minimum=1, maximum=4096)
    """Rank of the adapters."""
    alpha: float = limited(32.0, "Give a positive scale; twice the rank is usual.", above=0)
    """Scale of the adapters (the update is multiplied by alpha / rank)."""
    dropout: float = limited(0.0, "Give a probability from 0 to below 1.", minimum=0, below=1)
    """Dropout before the adapters."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Modules that get adapters, by name; `all-linear` is every linear layer but the head."""

    def __post_init__(self) -> None:
        check_limits(self, "run.method")
        check(bool(self.targets), "run.method.targets", self.targets, "Name at least one module, or all-linear.")


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation. One step is one optimizer update over `tokens_per_step` tokens of the whole cluster."""

    epochs: float = limited(1.0, "Give a positive number of passes.", above=0)
    """Passes over the training rows; fractions are allowed."""
    max_steps: int = limited(0, "Give 0 (by epochs) or a positive number of steps.", minimum=0)
    """Stop after this many steps (0: by epochs)."""
    tokens_per_step: int = limited(65536, "Give at least 16 tokens.", minimum=16)
    """Tokens of one optimizer step over all workers: dealt in proportion to their speed, whatever the number of workers."""
    micro_batch_tokens: int = limited(16384, "Give at least 16 tokens.", minimum=16)
    """Tokens packed into one forward and backward pass on one worker; the shape that is compiled."""
    learning_rate: float = limited(1e-5, "Give a rate between 0 and 1; 1e-5 is usual.", above=0, below=1)
    """Peak learning rate."""
    min_learning_rate: float = limited(0.0, "Give a rate from 0 to the peak learning rate.", minimum=0)
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_share: float = limited(0.03, "Give a share from 0 to below 1.", minimum=0, below=1)
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = limited(0.0, "Give a decay from 0 to below 1.", minimum=0, below=1)
    """AdamW's decoupled weight decay; not on norms, biases and embeddings."""
    beta1: float = limited(0.9, "Give a decay from 0 to below 1.", minimum=0, below=1)
    """AdamW's first moment decay."""
    beta2: float = limited(0.95, "Give a decay from 0 to below 1.", minimum=0, below=1)
    """AdamW's second moment decay."""
    epsilon: float = limited(1e-8, "Give a small positive number.", above=0)
    """AdamW's epsilon."""
    max_grad_norm: float = limited(1.0, "Give 0 (never) or a positive norm.", minimum=0)
    """Gradients are scaled down to this global norm (0: never)."""
    eval_every: int = limited(0, "Give 0 or a positive number.", minimum=0)
    """Steps between evaluations of the held-out loss (0: at the end of each epoch)."""
    eval_rows: int = limited(256, "Give 0 or a positive number.", minimum=0)
    """Held-out rows used by the evaluations during training (0: all)."""
    stop_perplexity: float = limited(0.0, "Give 0 (never) or a perplexity above 1.", minimum=0)
    """Stop when the held-out perplexity is at or below this (0: never)."""
    early_stopping: int = limited(0, "Give 0 or a positive number.", minimum=0)
    """Stop after this many evaluations without a better held-out loss (0: never)."""

    def __post_init__(self) -> None:
        check_limits(self, "run.train")
        check(self.tokens_per_step >= self.micro_batch_tokens, "run.train.tokens_per_step", self.tokens_per_step,
              f"Give at least one micro-batch ({self.micro_batch_tokens} tokens).")
        check(self.min_learning_rate <= self.learning_rate, "run.train.min_learning_rate", self.min_learning_rate,
              "Give a rate from 0 to the peak learning rate.")
        check(self.stop_perplexity == 0 or self.stop_perplexity > 1, "run.train.stop_perplexity", self.stop_perplexity,
              "Give 0 (never) or a perplexity above 1.")


@dataclass(frozen=True)
class EngineConfig:
    """How the model's state is spread over the workers. Decides speed and memory, and the last bits of the result."""

    kind: Literal["fsdp", "deepspeed"] = "fsdp"
    """PyTorch FSDP2 or DeepSpeed ZeRO; docs/decisions/engines.md says which was measured faster for which case."""
    zero_stage: Literal[1, 2, 3] = 3
    """What is sharded: optimizer (1), and gradients (2), and weights (3). With FSDP weights are gathered once a step below 3, and with 1
    gradients are summed on each worker and reduced once a step too, whatever the number of micro-batches."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer state and master weights live; `nvme` needs resources.scratch."""
    shard_group: Literal["auto", "world", "node"] = "auto"
    """FSDP: shard over all workers, or inside a node (one GPU type) and replicate across nodes; `auto` shards inside a node where there
    are several, each with the same number of workers (more than one), and one node's GPUs hold the state."""
    checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """Activation checkpointing; `auto` takes the least that `plan` finds to fit the memory."""
    activation_budget: float = limited(0.6, "Give a share above 0, at most 1.", above=0, maximum=1)
    """With `selective`: share of the activations that is kept."""
    compile: bool = True
    """Compile each decoder layer (GPU only)."""
    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """FP8 matrix products (torchao), on Ada and Hopper GPUs and later. With LoRA the frozen weights are kept in FP8 too."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients are summed across workers."""

    def __post_init__(self) -> None:
        check_limits(self, "run.engine")
        check(self.kind == "fsdp" or self.shard_group != "node", "run.engine.shard_group", self.shard_group,
              "DeepSpeed shards over the world here; use run.engine.kind: fsdp for hybrid sharding.")
        check(self.kind == "fsdp" or self.float8 == "none", "run.engine.float8", self.float8, "FP8 needs run.engine.kind: fsdp.")
        check(self.kind == "deepspeed" or self.zero_stage != 1 or self.offload == "none", "run.engine.zero_stage", self.zero_stage,
              "With run.engine.offload FSDP shards as stage 2 or 3 does: whole gradients would take the memory that offloading spares.")
        check(self.kind == "deepspeed" or self.offload != "nvme", "run.engine.offload", self.offload,
              "FSDP offloads to the CPU only; use run.engine.kind: deepspeed for NVMe.")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and what is kept."""

    every_steps: int = limited(0, "Give 0 or a positive number of steps.", minimum=0)
    """Steps between saves (0: by time alone)."""
    every_minutes: float = limited(10.0, "Give a positive number of minutes.", above=0)
    """Minutes between saves."""
    keep_last: int = limited(2, "Keep at least one checkpoint.", minimum=1)
    """Newest checkpoints that are kept."""
    keep_best: int = limited(1, "Give 0 or a positive number.", minimum=0)
    """Checkpoints with the lowest held-out loss that are kept besides."""
    on_full_disk: Literal["continue", "stop"] = "continue"
    """What a save that finds no room does: go on with the old checkpoints and say so, or stop the run."""

    def __post_init__(self) -> None:
        check_limits(self, "run.checkpoint")


@dataclass(frozen=True)
class EvaluationConfig:
    """Base against tuned on the held-out rows."""

    rows: int = limited(0, "Give 0 or a positive number.", minimum=0)
    """Held-out rows for loss, perplexity and decisions (0: all)."""
    generate_rows: int = limited(100, "Give 0 or a positive number.", minimum=0)
    """Held-out rows that are answered in full for token-F1 and ROUGE-L (0: none)."""
    max_new_tokens: int = limited(128, "Give a positive number of tokens.", minimum=1)
    """Longest generated answer."""
    samples: int = limited(5, "Give 0 or a positive number.", minimum=0)
    """Answers shown side by side in the report."""
    bootstrap: int = limited(2000, "Give at least 100 resamples.", minimum=100)
    """Resamples of the paired bootstrap confidence intervals."""

    def __post_init__(self) -> None:
        check_limits(self, "run.evaluation")


@dataclass(frozen=True)
class ExportConfig:
    """The model directory."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the exported weights."""
    shard_size_gb: float = limited(5.0, "Give a positive size.", above=0)
    """Largest safetensors file, in 10^9 bytes."""
    checkpoint: Literal["last", "best"] = "last"
    """Export the last checkpoint, or the one with the lowest held-out loss."""

    def __post_init__(self) -> None:
        check_limits(self, "run.export")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the result of a run."""

    name: str
    """The run's name; together with the hash it names the RayJob and the run directory."""
    model: ModelConfig
    """The base model."""
    data: DataConfig
    """The dataset."""
    seed: int = limited(17, "Give a seed from 0 to 2147483647.", minimum=0, maximum=2**31 - 1)
    """Seed of split, order, initialisation and dropout."""
    method: MethodConfig = field(default_factory=MethodConfig)
    """What is trained."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimisation."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How state is spread over the workers."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the state is saved."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Base against tuned."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """The model directory."""

    def __post_init__(self) -> None:
        check_limits(self, "run")
        check(bool(RUN_NAME.fullmatch(self.name)), "run.name", self.name,
              "Use 1 to 36 lower-case letters, digits and '-', starting with a letter and not ending with '-'.")
        check(self.train.micro_batch_tokens >= self.data.max_tokens, "run.train.micro_batch_tokens", self.train.micro_batch_tokens,
              f"A micro-batch must hold the longest row (run.data.max_tokens: {self.data.max_tokens}).")
        check(self.method.kind == "full" or self.engine.offload == "none", "run.engine.offload", self.engine.offload,
              "Adapters have little optimizer state; offload is for run.method.kind: full.")
        check(self.method.kind != "qlora" or self.engine.kind == "fsdp", "run.engine.kind", self.engine.kind,
              "4-bit weights are kept whole on each worker: use run.engine.kind: fsdp with run.method.kind: qlora.")
        check(self.method.kind != "qlora" or self.engine.float8 == "none", "run.engine.float8", self.engine.float8,
              "4-bit weights are multiplied in run.model.dtype; use none, or run.method.kind: lora, whose frozen weights are kept in FP8.")


@dataclass(frozen=True)
class GroupConfig:
    """Workers of one kind: nodes with the same GPUs and network. Their number adds up to `resources.workers`."""

    name: str
    """The group's name, for example `a100`."""
    workers: int = limited(1, "Give at least one worker.", minimum=1)
    """Training processes of the group."""
    gpu: str = ""
    """GPU type: a key of trainer/plan/hardware.py (empty: `resources.gpu`)."""
    memory_gb: float = limited(0.0, "Give 0 (the GPU type's) or a positive size.", minimum=0)
    """Memory of one GPU in GiB (0: the GPU type's)."""
    network_gbps: float = limited(0.0, "Give 0 (resources.network_gbps) or a positive bandwidth.", minimum=0)
    """Bandwidth of a node to the others in Gbit/s (0: `resources.network_gbps`)."""
    node_workers: int = limited(0, "Give 0 (resources.node_workers) or a positive number.", minimum=0)
    """Workers on one node (0: `resources.node_workers`)."""

    def __post_init__(self) -> None:
        check_limits(self, "resources.groups")


@dataclass(frozen=True)
class ResourcesConfig:
    """On what a run runs. Does not change the run's hash: the same run may go on elsewhere."""

    workers: int = limited(1, "Give at least one worker.", minimum=1)
    """Training processes, one a GPU (or a CPU share)."""
    min_workers: int = limited(0, "Give 0 (all) or at most resources.workers.", minimum=0)
    """Fewest workers that the run goes on with after a loss (0: all of `workers`)."""
    cpus_per_worker: float = limited(1.0, "Give a positive number of cores.", above=0)
    """CPU cores of a worker."""
    gpus_per_worker: float = limited(0.0, "Give 0 (CPU) or 1: one process a GPU.", minimum=0, maximum=1)
    """GPUs of a worker: 0 (CPU) or 1."""
    memory_gb: float = limited(0.0, "Give 0 (ask the device) or a positive size.", minimum=0)
    """Memory of one GPU in GiB, for `plan` (0: ask the device)."""
    gpu: str = ""
    """GPU type, for `plan`: a key of trainer/plan/hardware.py, for example `H100-80GB`."""
    network_gbps: float = limited(0.0, "Give 0 (not known) or a positive bandwidth.", minimum=0)
    """Bandwidth between nodes in Gbit/s, for `plan` (0: not known)."""
    node_workers: int = limited(0, "Give 0 (at most 8 on a node) or a positive number.", minimum=0)
    """Workers on one node, for `plan` (0: at most 8)."""
    groups: list[GroupConfig] = field(default_factory=list)
    """Unlike workers, for `plan`: one entry a kind of node (empty: all alike)."""
    balance: Literal["speed", "equal"] = "speed"
    """How a step's tokens are dealt: by the workers' measured speed, again when it changes; or equally, which repeats a run bit for bit."""
    prepare_cpus: float = limited(1.0, "Give a positive number of cores.", above=0)
    """CPU cores of the dataset preparation."""
    max_failures: int = limited(10, "Give 0 or a positive number.", minimum=0)
    """Worker losses after which the run gives up, counted anew with each new checkpoint."""
    scratch: str = ""
    """Node-local directory for offload to NVMe."""

    def __post_init__(self) -> None:
        check_limits(self, "resources")
        check(self.min_workers <= self.workers, "resources.min_workers", self.min_workers,
              f"Give 0 (all) or at most resources.workers ({self.workers}).")
        names = [group.name for group in self.groups]
        check(len(set(names)) == len(names), "resources.groups", names, "Give each group a name of its own.")
        check(not names or sum(group.workers for group in self.groups) == self.workers, "resources.groups",
              [group.workers for group in self.groups], f"Their workers must add up to resources.workers ({self.workers}).")
        check(self.gpus_per_worker in (0, 1), "resources.gpus_per_worker", self.gpus_per_worker, "Give 0 (CPU) or 1: one process a GPU.")


@dataclass(frozen=True)
class Config:
    """A whole configuration file."""

    run: RunConfig
    """What decides the result."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """On what it runs."""
    storage: str = "/storage"
    """Where the shared storage is mounted."""
    id: str = ""
    """`<run>-<hash>`; empty: the run's name alone (a run by hand)."""

    def __post_init__(self) -> None:
        check(os.path.isabs(self.storage), "storage", self.storage, "Give an absolute path.")
        check(self.id == "" or (self.id.startswith(self.run.name) and bool(RUN_ID.fullmatch(self.id))), "id", self.id,
              f"Start with run.name ({self.run.name}); use lower-case letters, digits and '-', 47 at most.")

    @property
    def run_id(self) -> str:
        """The name of RayJob, Ray Train run and run directory."""
        return self.id or self.run.name

    @property
    def storage_path(self) -> Path:
        """Root of the shared storage."""
        return Path(self.storage)


def _check_plain(value: Any, where: str = "", depth: int = 0, seen: list[int] | None = None) -> None:
    """ConfigError for the first value that is not text, number, true, false, null, list or mapping, or for too many of them.

    YAML has more than that (dates, sets, texts that contain themselves), and run.yaml, the hash and Ray must be able to hold it.
    """
    seen = seen if seen is not None else [0]
    seen[0] += 1
    place = where or "the file"
    check(depth <= MAX_DEPTH, place, None, f"It is nested more than {MAX_DEPTH} deep. Write the values out plainly.")
    check(seen[0] <= MAX_VALUES, place, None, f"The file has more than {MAX_VALUES} values, aliases counted where they are used.")
    if isinstance(value, dict):
        for key, inner in value.items():
            check(isinstance(key, str), place, key, "Give text as a field's name (in quotes, where YAML reads something else).")
            _check_plain(key, place, depth + 1, seen)
            _check_plain(inner, _joined(where, key), depth + 1, seen)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check_plain(inner, f"{where}[{i}]", depth + 1, seen)
    elif isinstance(value, str):
        check(not _NOT_TEXT.search(value), place, value, "Give text without control characters.")
    elif isinstance(value, float):
        check(math.isfinite(value), place, value, "Give a finite number.")
    elif isinstance(value, int):
        check(-(1 << 63) <= value < 1 << 63, place, value, "Give a number of at most 64 bits.")
    else:
        check(value is None, place, value, "Give text (in quotes, where YAML reads something else), a number, true or false.")


def _joined(where: str, key: str) -> str:
    """The place of a field, for messages."""
    return f"{where}.{key[:80]}" if where else key[:80] or "''"


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` (from YAML) as the type `kind`; ConfigError with the field's place if it is not of that type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        check(isinstance(value, dict), where or "the file", value, "Give a mapping of fields.")
        fields = {f.name: f for f in dataclasses.fields(kind)}
        hints = typing.get_type_hints(kind)
        prefix = f"{where}." if where else ""
        for key in value:
            check(key in fields, _joined(where, key), value[key], f"Unknown field; {where or 'the file'} has {', '.join(fields)}.")
        for name, f in fields.items():
            if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{prefix}{name}", None, "This field is required.")
        return typing.cast(type, kind)(**{k: _build(hints[k], v, f"{prefix}{k}") for k, v in value.items()})
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
        if isinstance(value, str):  # YAML 1.1 reads 1e-5 (no point) as text
            try:
                value = float(value)
            except ValueError:
                pass
        check(isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value), where, value, "Give a number.")
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer() and abs(value) <= 1 << 53:  # Helm writes whole numbers as floats
        value = int(value)
    check(isinstance(value, kind) and not (kind is int and isinstance(value, bool)), where, value,
          {int: "Give a whole number.", str: "Give text.", bool: "Give true or false."}.get(kind, f"Give {kind}."))
    return value


def parse(document: Any) -> Config:
    """A Config from a parsed YAML document. Raises ConfigError naming the field, the value and the remedy."""
    _check_plain(document)
    return typing.cast(Config, _build(Config, document, ""))


def load(source: str, **overrides: Any) -> Config:
    """Read a configuration: `source` is a file, or `env:NAME` for an environment variable that holds the YAML (or JSON) text. An
    environment's finetune.yaml is one too.

    `overrides` replace top-level parts that are not None (`storage`, `id`).
    """
    if source.startswith("env:"):
        name = source[4:]
        check(name in os.environ, "--config", source, f"The environment variable {name} is not set.")
        text = os.environ[name]
    else:
        check(os.path.isfile(source), "--config", source, "No such file.")
        check(os.path.getsize(source) <= MAX_BYTES, "--config", source, f"It is larger than {MAX_BYTES >> 20} MiB, as no configuration is.")
        try:
            text = Path(source).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError("--config", source, f"It cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise ConfigError("--config", source, "It is not UTF-8 text. Convert it (iconv -t utf-8).") from None
    document = _parsed(source, text)
    check(isinstance(document, dict), "--config", source, "The file must be a mapping with run and resources.")
    if isinstance(job := document.get("finetune-job"), dict) and "run" not in document:  # an environment's finetune.yaml
        document = {key: job[key] for key in ("run", "resources") if key in job}
    return parse({**document, **{k: v for k, v in overrides.items() if v is not None}})


def _parsed(source: str, text: str) -> Any:
    """The document of a JSON or YAML text. JSON is tried first: YAML 1.1 reads its number 1e-5 as text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ConfigError("--config", source, f"It is nested more than {MAX_DEPTH} deep. Write the values out plainly.") from None
    except Exception as error:  # beside YAMLError, what Python's conversions raise for `2001-99-99`, `!!bool x`, `!!int ""`
        line = " ".join(str(error).split())[:300]
        raise ConfigError("--config", source, f"It is not valid YAML: {type(error).__name__}: {line}.") from None


def to_dict(config: Any) -> Any:
    """The configuration as plain YAML values, defaults included."""
    return dataclasses.asdict(config)


