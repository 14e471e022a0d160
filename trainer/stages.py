"""The stages of a run, each done once: what is whole in the run directory is not made again.

`prepare` needs one process; train, export, evaluate and report are done by a worker group (`work`), whose rank 0 writes. Nothing here
needs Ray: trainer/launch.py starts the workers, and a single worker can run in this process. torch is imported where it is used, so
that the driver stays small.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trainer import inputs
from trainer.config import Config, parse, to_dict
from trainer.errors import UserError
from trainer.files import read_manifest, require_manifest, write_atomic
from trainer.memory import release
from trainer.paths import RunPaths
from trainer.train.progress import Progress

if TYPE_CHECKING:
    import torch

    from trainer.train.ranks import Ranks

log = logging.getLogger(__name__)

WORK = ("train", "export", "evaluate", "report")
"""Stages of the worker group, in order. Export comes before evaluate: what is evaluated is what will be served."""

Report = Callable[[dict[str, Any]], None]


def config_sha256(config: Config) -> str:
    """Digest of everything in the configuration that decides the result (its `run` part, defaults included)."""
    return hashlib.sha256(json.dumps(to_dict(config.run), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_run(config: Config, paths: RunPaths) -> None:
    """Write run.yaml, or compare with the one that is there. Raises UserError if the run was begun with other inputs."""
    digest = config_sha256(config)
    if paths.config.exists():
        try:
            known = yaml.safe_load(paths.config.read_text(encoding="utf-8"))["run"]
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise UserError(f"{paths.config} is not readable ({error}). Remove it to let the run go on.") from None
        if known == to_dict(config.run):
            return
        different = ", ".join(_differences(known, to_dict(config.run)))
        raise UserError(f"{paths.root} belongs to a run with other inputs; different: {different}. Give the changed run another name "
                        "or id, or remove that directory.")
    paths.root.mkdir(parents=True, exist_ok=True)
    write_atomic(paths.config, f"# Resolved configuration of this run. sha256 of its run part (canonical JSON): {digest}\n"
                 + yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


def _differences(old: Any, new: Any, where: str = "run") -> list[str]:
    """Fields whose values differ, as `run.train.learning_rate (1e-05, now 2e-05)`."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for key in {**old, **new} for d in _differences(old.get(key), new.get(key), f"{where}.{key}")]
    return [] if old == new else [f"{where} ({old!r}, now {new!r})"]


def finished(paths: RunPaths) -> dict[str, Any] | None:
    """The report of a run that is done, if report.json and the exported model are whole."""
    try:
        report = json.loads(paths.report("json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(report, dict) and read_manifest(paths.model) is not None
    return report if whole and all(paths.report(kind).exists() for kind in ("md", "html")) else None


def prepare(config: Config) -> dict[str, Any]:
    """The dataset stage; returns its manifest."""
    from trainer.data.prepare import prepare as make

    paths = RunPaths.of(config)
    inputs.check(config, paths)
    progress = Progress(paths.progress)
    progress.update("prepare", 0.0, "reading the dataset")
    began = time.monotonic()
    manifest = make(config, progress=lambda share, message: progress.update("prepare", 100.0 * share, message))
    message = ", ".join(f"{split['rows']} {name} rows" for name, split in manifest["splits"].items())
    progress.update("prepare", 100.0, message)
    log.info("Dataset: %s (%.1f s)", message, time.monotonic() - began)
    return manifest


def work(config: Config, stages: Sequence[str], device: torch.device, *, local_rank: int = 0, gauges: bool = False,
         report: Report | None = None) -> dict[str, Any]:
    """Stages of the worker group, on one of its ranks; collective. torch.distributed is initialised if there are several ranks.

    `report` is called on all ranks with metrics. Returns a short summary. Raises UserError, Preempted, or RuntimeError when another
    rank is lost.
    """
    from trainer.train import samplers
    from trainer.train.ranks import Ranks

    paths = RunPaths.of(config)
    ranks = Ranks(timeout_s=7200.0)
    sampler = samplers.start(paths, gpus=device.type == "cuda") if local_rank == 0 else None
    progress = Progress(paths.progress) if ranks.rank == 0 else None
    summary: dict[str, Any] = {}
    try:
        if "train" in stages and not _agreed(ranks, lambda: "export" in stages and _exported(paths)):
            _check_inputs(config, paths, ranks)
            summary = train(config, paths, ranks, device, gauges=gauges, report=report)
            release()  # the stages that follow need the memory
        if "export" in stages:
            _on_first(ranks, progress, "export", lambda p: _export(config, paths, p))
        if "evaluate" in stages:
            _check_inputs(config, paths, ranks)
            _evaluate(config, paths, ranks, device, progress)
    finally:
        if sampler is not None:
            sampler.close()
    ranks.barrier()
    if "report" in stages:
        _on_first(ranks, progress, "report", lambda p: _report(config, paths))
    return summary


def _check_inputs(config: Config, paths: RunPaths, ranks: Ranks) -> None:
    """Rank 0 looks whether the base model is still the one of the run's beginning, before the others read it."""
    if ranks.rank == 0:
        inputs.check(config, paths)
    ranks.barrier()


def _agreed(ranks: Ranks, ask: Callable[[], bool]) -> bool:
    """Rank 0's answer, on every rank: what the storage shows may differ between nodes for some seconds."""
    return bool(ranks.from_first([int(ask())] if ranks.rank == 0 else [])[0])


def _on_first(ranks: Ranks, progress: Progress | None, stage: str, do: Callable[[Progress], None]) -> None:
    """Rank 0 does it while the others wait."""
    if progress is not None:
        progress.update(stage, 0.0)
        do(progress)
        progress.update(stage, 100.0)
    ranks.barrier()


def _exported(paths: RunPaths) -> bool:
    return read_manifest(paths.model) is not None


def train(config: Config, paths: RunPaths, ranks: Ranks, device: torch.device, *, gauges: bool = False,
          report: Report | None = None) -> dict[str, Any]:
    """The training stage: from the newest whole checkpoint to the end."""
    import torch

    from trainer.checkpoint.saver import Checkpointer, restore
    from trainer.data.loader import evaluation_batches
    from trainer.data.shards import TokenShards
    from trainer.engines import make_engine
    from trainer.train import stop
    from trainer.train.balance import start as start_budgets
    from trainer.train.loop import Training
    from trainer.train.metrics import Recorder, peak_flops

    require_manifest(paths.dataset, "prepare")
    digest = config_sha256(config)
    shards, test = TokenShards(paths.dataset, "train"), TokenShards(paths.dataset, "test")
    count = config.run.train.eval_rows
    rows = range(min(count, len(test)) if count else len(test))
    if ranks.rank == 0:
        Progress(paths.progress).update("train", 0.0, "loading the model")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    began = time.monotonic()
    with stop.watching() as asked, contextlib.ExitStack() as at_end:
        engine = make_engine(config, device, ranks.rank, ranks.world)
        at_end.callback(engine.close)
        checkpointer = Checkpointer(paths.checkpoints, config.run.checkpoint, digest, engine)
        at_end.callback(checkpointer.wait)  # before the engine's memory goes: a save may still read from it
        saved = restore(paths.checkpoints, digest, engine, ranks)
        devices = ranks.gather_objects(name)
        layout = describe_layout(devices, ranks.gather_objects(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        budgets, rebalance = start_budgets(config, ranks, engine.lockstep_group, saved, device, devices)
        held_out = evaluation_batches(test, rows, [max(of_rank) for of_rank in budgets], ranks.rank, config.run.data.loss_on)
        peaks = ranks.sum([peak_flops(name), float(peak_flops(name) == 0)])
        if ranks.rank == 0:
            log.info("%s: %d workers, %s on %s (%.1f s)", f"Going on after step {saved['step']}" if saved else "Starting", ranks.world,
                     type(engine).__name__, name, time.monotonic() - began)
        recorder = Recorder(paths, config.run_id, saved["step"] if saved else 0, gauges=gauges) if ranks.rank == 0 else None
        training = Training(config, engine, ranks, checkpointer, shards, held_out, budgets, peak=0.0 if peaks[1] else peaks[0],
                            rebalance=rebalance, recorder=recorder, report=report, stop=asked, stored={"devices": devices}, layout=layout)
        try:
            training.resume(saved)
            state = training.run()
        finally:
            if recorder is not None:
                recorder.close()
    return {"step": training.step, "finished": state.finished, "tokens": state.tokens, "seconds": round(state.seconds, 3), **state.metrics}


def describe_layout(devices: Sequence[str], node_workers: Sequence[int]) -> list[dict[str, Any]]:
    """The workers in order, alike ones in a row as one: `{device, workers, node_workers}`."""
    groups: list[dict[str, Any]] = []
    for device, size in zip(devices, node_workers, strict=True):
        if groups and (groups[-1]["device"], groups[-1]["node_workers"]) == (device, size):
            groups[-1]["workers"] += 1
        else:
            groups.append({"device": device, "workers": 1, "node_workers": size})
    return groups


def _export(config: Config, paths: RunPaths, progress: Progress) -> None:
    if _exported(paths):
        return
    from transformers import AutoTokenizer

    from trainer.checkpoint import store
    from trainer.checkpoint.reader import CheckpointReader
    from trainer.export import export

    saved = store.best(paths.checkpoints) if config.run.export.checkpoint == "best" else store.newest(paths.checkpoints)
    if saved is None:
        raise UserError(f"{paths.checkpoints} has no whole checkpoint. Run `python -m trainer train` first.")
    reader = CheckpointReader(saved.path)
    if wrong := reader.verify():
        raise UserError(f"Checkpoint {saved.path.name} is broken ({wrong}). Run `python -m trainer train`: it goes on from the one before.")
    if not reader.state["loop"]["finished"] and store.newest(paths.checkpoints) == saved:
        raise UserError(f"Training has not ended (step {saved.step}). Run `python -m trainer train` first.")
    export(config, paths, reader, AutoTokenizer.from_pretrained(paths.dataset / "tokenizer", trust_remote_code=False),
           lambda share: progress.update("export", 100.0 * share))


def _evaluate(config: Config, paths: RunPaths, ranks: Ranks, device: torch.device, progress: Progress | None) -> None:
    from trainer.evaluate.run import evaluate

    def advance(done: int, total: int, text: str) -> None:
        if progress is not None:
            progress.update("evaluate", 100.0 * done / max(1, total), text)

    evaluate(config, paths, ranks.rank, ranks.world, device, ranks.gather_objects, advance)
    ranks.barrier()


def _report(config: Config, paths: RunPaths) -> None:
    from trainer.report.write import write_report
    from trainer.train import samplers

    samplers.merge(paths)
    write_report(config, paths)


def from_document(document: dict[str, Any]) -> Config:
    """The configuration as it travels to tasks and workers."""
    return parse(document)


def root() -> Path:
    """The folder that holds the package `trainer`: workers import from there."""
    return Path(__file__).resolve().parent.parent
