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


def check(ok: bool, field: str, value: object, remedy: str) -> None:
    """Raise ConfigError(field, value, remedy) unless `ok`."""
    if not ok:
        raise ConfigError(field, value, remedy)


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
            check(bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.name)), "run.model.name", self.name, "Give a hub name: owner/model.")
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
    max_tokens: int = 512
    """Longest row in tokens; a longer one has its context shortened, never its question or answer."""
    test_share: float = 0.2
    """Share of the rows held out, by a hash of the row's id and the seed (stable under row order)."""
    max_rows: int = 0
    """Use at most this many rows (0: all), chosen by the same hash."""
    exclude_ids: str = ""
    """File on the shared storage with one row id a line that must not be used; PubMedQA's official test ids are always
    excluded when its labelled set is read from the hub or its published form, unless `keep_official_test` is set."""
    keep_official_test: bool = False
    """Do not exclude PubMedQA's 500 official test ids."""
    near_duplicates: float = 0.8
    """Rows of the training split whose word-shingle similarity (Jaccard) to a held-out row is at least this are removed; 1 removes
    exact duplicates only."""
    max_rejected: float = 0.05
    """The run stops if more than this share of the rows is rejected (duplicates and exclusions do not count)."""

    def __post_init__(self) -> None:
        given = [k for k in ("sample", "name", "path") if getattr(self, k)]
        check(len(given) == 1, "run.data", given, "Set exactly one of run.data.sample, run.data.name and run.data.path.")
        if self.name:
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
        check(16 <= self.max_tokens <= 1 << 20, "run.data.max_tokens", self.max_tokens, "Give 16 to 1048576 tokens.")
        check(0 < self.test_share < 1, "run.data.test_share", self.test_share, "Give a share between 0 and 1, both excluded.")
        check(self.max_rows >= 0, "run.data.max_rows", self.max_rows, "Give 0 (all rows) or a positive number.")
        check(0 < self.near_duplicates <= 1, "run.data.near_duplicates", self.near_duplicates, "Give a similarity above 0, at most 1.")
        check(0 <= self.max_rejected <= 1, "run.data.max_rejected", self.max_rejected, "Give a share from 0 to 1.")


@dataclass(frozen=True)
class MethodConfig:
    """What of the model is trained."""

    kind: Literal["full", "lora", "qlora"] = "full"
    """All weights; low-rank adapters beside frozen weights; the same beside frozen 4-bit (NF4) weights."""
    rank: int = 16
    """Rank of the adapters."""
    alpha: float = 32.0
    """Scale of the adapters (the update is multiplied by alpha / rank)."""
    dropout: float = 0.0
    """Dropout before the adapters."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Modules that get adapters, by name; `all-linear` is every linear layer but the head."""

    def __post_init__(self) -> None:
        check(1 <= self.rank <= 4096, "run.method.rank", self.rank, "Give a rank from 1 to 4096; 8 to 64 is usual.")
        check(self.alpha > 0, "run.method.alpha", self.alpha, "Give a positive scale; twice the rank is usual.")
        check(0 <= self.dropout < 1, "run.method.dropout", self.dropout, "Give a probability from 0 to below 1.")
        check(bool(self.targets), "run.method.targets", self.targets, "Name at least one module, or all-linear.")


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation. One step is one optimizer update over `tokens_per_step` tokens of the whole cluster."""

    epochs: float = 1.0
    """Passes over the training rows; fractions are allowed."""
    max_steps: int = 0
    """Stop after this many steps (0: by epochs)."""
    tokens_per_step: int = 65536
    """Tokens of one optimizer step over all workers: dealt in proportion to their speed, whatever the number of workers."""
    micro_batch_tokens: int = 16384
    """Tokens packed into one forward and backward pass on one worker; the shape that is compiled."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_share: float = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; not on norms, biases and embeddings."""
    beta1: float = 0.9
    """AdamW's first moment decay."""
    beta2: float = 0.95
    """AdamW's second moment decay."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm (0: never)."""
    eval_every: int = 0
    """Steps between evaluations of the held-out loss (0: at the end of each epoch)."""
    eval_rows: int = 256
    """Held-out rows used by the evaluations during training (0: all)."""
    stop_perplexity: float = 0.0
    """Stop when the held-out perplexity is at or below this (0: never)."""
    early_stopping: int = 0
    """Stop after this many evaluations without a better held-out loss (0: never)."""

    def __post_init__(self) -> None:
        check(self.epochs > 0, "run.train.epochs", self.epochs, "Give a positive number of passes.")
        check(self.max_steps >= 0, "run.train.max_steps", self.max_steps, "Give 0 (by epochs) or a positive number of steps.")
        check(self.micro_batch_tokens >= 16, "run.train.micro_batch_tokens", self.micro_batch_tokens, "Give at least 16 tokens.")
        check(self.tokens_per_step >= self.micro_batch_tokens, "run.train.tokens_per_step", self.tokens_per_step,
              f"Give at least one micro-batch ({self.micro_batch_tokens} tokens).")
        check(0 < self.learning_rate < 1, "run.train.learning_rate", self.learning_rate, "Give a rate between 0 and 1; 1e-5 is usual.")
        check(0 <= self.min_learning_rate <= self.learning_rate, "run.train.min_learning_rate", self.min_learning_rate,
              "Give a rate from 0 to the peak learning rate.")
        check(0 <= self.warmup_share < 1, "run.train.warmup_share", self.warmup_share, "Give a share from 0 to below 1.")
        check(0 <= self.weight_decay < 1, "run.train.weight_decay", self.weight_decay, "Give a decay from 0 to below 1.")
        check(0 <= self.beta1 < 1, "run.train.beta1", self.beta1, "Give a decay from 0 to below 1.")
        check(0 <= self.beta2 < 1, "run.train.beta2", self.beta2, "Give a decay from 0 to below 1.")
        check(self.epsilon > 0, "run.train.epsilon", self.epsilon, "Give a small positive number.")
        check(self.max_grad_norm >= 0, "run.train.max_grad_norm", self.max_grad_norm, "Give 0 (never) or a positive norm.")
        for name in ("eval_every", "eval_rows", "early_stopping"):
            check(getattr(self, name) >= 0, f"run.train.{name}", getattr(self, name), "Give 0 or a positive number.")
        check(self.stop_perplexity == 0 or self.stop_perplexity > 1, "run.train.stop_perplexity", self.stop_perplexity,
              "Give 0 (never) or a perplexity above 1.")


@dataclass(frozen=True)
class EngineConfig:
    """How the model's state is spread over the workers. Decides speed and memory, and the last bits of the result."""

    kind: Literal["fsdp", "deepspeed"] = "fsdp"
    """PyTorch FSDP2 or DeepSpeed ZeRO; docs/speed.md says which is measured faster for which case."""
    zero_stage: Literal[1, 2, 3] = 3
    """What is sharded: optimizer (1), and gradients (2), and weights (3). FSDP takes 2 (weights stay gathered after forward) or 3."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer state and master weights live; `nvme` needs resources.scratch."""
    shard_group: Literal["world", "node"] = "world"
    """FSDP: shard over all workers, or inside a node (one GPU type) and replicate across nodes."""
    checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """Activation checkpointing; `auto` takes the least that `plan` finds to fit the memory."""
    activation_budget: float = 0.6
    """With `selective`: share of the activations that is kept."""
    compile: bool = True
    """Compile each decoder layer (GPU only)."""
    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """FP8 matrix products (torchao), on Hopper GPUs and later."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients are summed across workers."""

    def __post_init__(self) -> None:
        check(0 < self.activation_budget <= 1, "run.engine.activation_budget", self.activation_budget, "Give a share above 0, at most 1.")
        check(self.kind == "fsdp" or self.shard_group == "world", "run.engine.shard_group", self.shard_group,
              "DeepSpeed shards over the world here; use run.engine.kind: fsdp for hybrid sharding.")
        check(self.kind == "fsdp" or self.float8 == "none", "run.engine.float8", self.float8, "FP8 needs run.engine.kind: fsdp.")
        check(self.kind == "deepspeed" or self.zero_stage != 1, "run.engine.zero_stage", self.zero_stage,
              "FSDP shards as stage 2 or 3 does; stage 1 needs run.engine.kind: deepspeed.")
        check(self.kind == "deepspeed" or self.offload != "nvme", "run.engine.offload", self.offload,
              "FSDP offloads to the CPU only; use run.engine.kind: deepspeed for NVMe.")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and what is kept."""

    every_steps: int = 0
    """Steps between saves (0: by time alone)."""
    every_minutes: float = 10.0
    """Minutes between saves."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Checkpoints with the lowest held-out loss that are kept besides."""
    on_full_disk: Literal["continue", "stop"] = "continue"
    """What a save that finds no room does: go on with the old checkpoints and say so, or stop the run."""

    def __post_init__(self) -> None:
        check(self.every_steps >= 0, "run.checkpoint.every_steps", self.every_steps, "Give 0 or a positive number of steps.")
        check(self.every_minutes > 0, "run.checkpoint.every_minutes", self.every_minutes, "Give a positive number of minutes.")
        check(self.keep_last >= 1, "run.checkpoint.keep_last", self.keep_last, "Keep at least one checkpoint.")
        check(self.keep_best >= 0, "run.checkpoint.keep_best", self.keep_best, "Give 0 or a positive number.")


@dataclass(frozen=True)
class EvaluationConfig:
    """Base against tuned on the held-out rows."""

    rows: int = 0
    """Held-out rows for loss, perplexity and decisions (0: all)."""
    generate_rows: int = 100
    """Held-out rows that are answered in full for token-F1 and ROUGE-L (0: none)."""
    max_new_tokens: int = 128
    """Longest generated answer."""
    samples: int = 5
    """Answers shown side by side in the report."""
    bootstrap: int = 2000
    """Resamples of the paired bootstrap confidence intervals."""

    def __post_init__(self) -> None:
        for name in ("rows", "generate_rows", "samples"):
            check(getattr(self, name) >= 0, f"run.evaluation.{name}", getattr(self, name), "Give 0 or a positive number.")
        check(self.max_new_tokens >= 1, "run.evaluation.max_new_tokens", self.max_new_tokens, "Give a positive number of tokens.")
        check(self.bootstrap >= 100, "run.evaluation.bootstrap", self.bootstrap, "Give at least 100 resamples.")


@dataclass(frozen=True)
class ExportConfig:
    """The model directory."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the exported weights."""
    shard_size_gb: float = 5.0
    """Largest safetensors file, in 10^9 bytes."""
    checkpoint: Literal["last", "best"] = "last"
    """Export the last checkpoint, or the one with the lowest held-out loss."""

    def __post_init__(self) -> None:
        check(self.shard_size_gb > 0, "run.export.shard_size_gb", self.shard_size_gb, "Give a positive size.")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the result of a run."""

    name: str
    """The run's name; together with the hash it names the RayJob and the run directory."""
    model: ModelConfig
    """The base model."""
    data: DataConfig
    """The dataset."""
    seed: int = 17
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
        check(bool(RUN_NAME.fullmatch(self.name)), "run.name", self.name,
              "Use 1 to 36 lower-case letters, digits and '-', starting with a letter and not ending with '-'.")
        check(0 <= self.seed < 2**31, "run.seed", self.seed, "Give a seed from 0 to 2147483647.")
        check(self.train.micro_batch_tokens >= self.data.max_tokens, "run.train.micro_batch_tokens", self.train.micro_batch_tokens,
              f"A micro-batch must hold the longest row (run.data.max_tokens: {self.data.max_tokens}).")
        check(self.method.kind == "full" or self.engine.offload == "none", "run.engine.offload", self.engine.offload,
              "Adapters have little optimizer state; offload is for run.method.kind: full.")
        check(self.method.kind != "qlora" or self.engine.kind == "fsdp", "run.engine.kind", self.engine.kind,
              "4-bit weights are kept whole on each worker: use run.engine.kind: fsdp with run.method.kind: qlora.")


@dataclass(frozen=True)
class ResourcesConfig:
    """On what a run runs. Does not change the run's hash: the same run may go on elsewhere."""

    workers: int = 1
    """Training processes, one a GPU (or a CPU share)."""
    min_workers: int = 0
    """Fewest workers that the run goes on with after a loss (0: all of `workers`)."""
    cpus_per_worker: float = 1.0
    """CPU cores of a worker."""
    gpus_per_worker: float = 0.0
    """GPUs of a worker: 0 (CPU) or 1."""
    memory_gb: float = 0.0
    """Memory of one GPU in GiB, for `plan` (0: ask the device)."""
    gpu: str = ""
    """GPU type, for `plan`: a key of trainer/plan/hardware.py, for example `H100-80GB`."""
    network_gbps: float = 0.0
    """Bandwidth between nodes in Gbit/s, for `plan` (0: not known)."""
    prepare_cpus: float = 1.0
    """CPU cores of the dataset preparation."""
    max_failures: int = 10
    """Worker losses after which the run gives up."""
    scratch: str = ""
    """Node-local directory for offload to NVMe."""

    def __post_init__(self) -> None:
        check(self.workers >= 1, "resources.workers", self.workers, "Give at least one worker.")
        check(0 <= self.min_workers <= self.workers, "resources.min_workers", self.min_workers,
              f"Give 0 (all) or at most resources.workers ({self.workers}).")
        check(self.cpus_per_worker > 0, "resources.cpus_per_worker", self.cpus_per_worker, "Give a positive number of cores.")
        check(self.gpus_per_worker in (0, 1), "resources.gpus_per_worker", self.gpus_per_worker, "Give 0 (CPU) or 1: one process a GPU.")
        check(self.prepare_cpus > 0, "resources.prepare_cpus", self.prepare_cpus, "Give a positive number of cores.")
        check(self.max_failures >= 0, "resources.max_failures", self.max_failures, "Give 0 or a positive number.")


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
        check(self.id == "" or self.id.startswith(self.run.name), "id", self.id, f"Start with run.name ({self.run.name}).")

    @property
    def run_id(self) -> str:
        """The name of RayJob, Ray Train run and run directory."""
        return self.id or self.run.name

    @property
    def storage_path(self) -> Path:
        """Root of the shared storage."""
        return Path(self.storage)


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` (from YAML) as the type `kind`; ConfigError with the field's place if it is not of that type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        check(isinstance(value, dict), where, value, "Give a mapping of fields.")
        fields = {f.name: f for f in dataclasses.fields(kind)}
        hints = typing.get_type_hints(kind)
        prefix = f"{where}." if where else ""
        for key in value:
            check(key in fields, f"{prefix}{key}", value[key], f"Unknown field; {where or 'the file'} has {', '.join(fields)}.")
        for name, f in fields.items():
            if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{prefix}{name}", None, "This field is required.")
        return kind(**{k: _build(hints[k], v, f"{prefix}{k}") for k, v in value.items()})
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
        check(isinstance(value, int | float) and not isinstance(value, bool) and value == value, where, value, "Give a number.")
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    check(isinstance(value, kind) and not (kind is int and isinstance(value, bool)), where, value,
          {int: "Give a whole number.", str: "Give text.", bool: "Give true or false."}.get(kind, f"Give {kind}."))
    return value


def parse(document: Any) -> Config:
    """A Config from a parsed YAML document. Raises ConfigError naming the field, the value and the remedy."""
    return typing.cast(Config, _build(Config, document, ""))


def load(source: str, **overrides: Any) -> Config:
    """Read a configuration: `source` is a file, or `env:NAME` for an environment variable that holds the YAML text.

    `overrides` replace top-level parts that are not None (`storage`, `id`).
    """
    if source.startswith("env:"):
        name = source[4:]
        check(name in os.environ, "--config", source, f"The environment variable {name} is not set.")
        text = os.environ[name]
    else:
        check(os.path.isfile(source), "--config", source, "No such file.")
        text = Path(source).read_text(encoding="utf-8")
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("--config", source, f"It is not valid YAML: {error}") from None
    check(isinstance(document, dict), "--config", source, "The file must be a mapping with run and resources.")
    return parse({**document, **{k: v for k, v in overrides.items() if v is not None}})


def to_dict(config: Any) -> Any:
    """The configuration as plain YAML values, defaults included."""
    return dataclasses.asdict(config)


