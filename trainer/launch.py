"""A run from beginning to end on Ray: prepare as a task, then one Ray Train worker group that trains, exports, evaluates and reports.

The same driver runs inside a Ray cluster (RAY_ADDRESS is set, as in a RayJob) and alone, where it starts Ray on this machine. It stays
small: torch is imported by the workers only. That is why the process group is set up here and not by Ray's TorchTrainer, which is
DataParallelTrainer with a backend like this one, but imports torch in driver and controller (measured: 630 MB against 185 MB each).
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Read by Ray when it is imported. On a busy machine its parts take longer to start than it allows by itself.
os.environ.setdefault("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "300")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_COLOR_PREFIX", "0")
# By itself Ray starts a task again without an end that its node has no memory for.
os.environ.setdefault("RAY_task_oom_retries", "3")

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from trainer import failures, memory, stages
from trainer.config import Config, to_dict
from trainer.errors import UserError
from trainer.lock import Lock
from trainer.paths import RunPaths
from trainer.scaling import Elastic, FixedSize, fits, living_nodes
from trainer.train.progress import Follower, Progress

log = logging.getLogger(__name__)

QUIET = {"env_vars": {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}}
"""Environment of tasks and workers: a progress bar's redrawn lines are noise in the driver's log, which shows progress.json."""

GROUP_TIMEOUT_S = 1800
"""Longest that a worker waits for the others in one collective operation (the first step compiles)."""


class ProcessGroup(BackendConfig):
    """torch.distributed over the workers: gloo, and NCCL where there are GPUs."""

    def __init__(self, gpus: bool) -> None:
        self.gpus = gpus

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroup

    def to_dict(self) -> dict[str, Any]:
        return {"gpus": self.gpus, "timeout_s": GROUP_TIMEOUT_S}


class _ProcessGroup(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, _address)
        gpus = getattr(backend_config, "gpus", False)
        failures.started(ray.get(worker_group.execute_async(_join, address, port, gpus)))

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Nothing: the workers' processes end with the group."""


def _address() -> tuple[str, int]:
    """In the first worker: where the others meet it."""
    from ray.train._internal.utils import get_address_and_port

    return get_address_and_port()


def _join(address: str, port: int, gpus: bool) -> memory.Container:
    """In each worker's main thread: join the process group, and take over SIGTERM. Returns what the worker's container may hold."""
    import datetime

    import torch.distributed as dist

    from trainer.train import stop

    context = ray.train.get_context()
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port),
                      RANK=str(context.get_world_rank()), WORLD_SIZE=str(context.get_world_size()),
                      LOCAL_RANK=str(context.get_local_rank()), LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
                      NODE_RANK=str(context.get_node_rank()))
    stop.install()
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", rank=context.get_world_rank(), world_size=context.get_world_size(),
                            timeout=datetime.timedelta(seconds=GROUP_TIMEOUT_S))
    return memory.container()


def _worker(job: dict[str, Any]) -> dict[str, Any]:
    """The function of Ray Train's worker group."""
    import torch

    context = ray.train.get_context()
    rank = context.get_world_rank()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(levelname).1s %(message)s", force=True)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    try:
        config = stages.from_document(job["config"])
        if config.resources.gpus_per_worker:
            from ray.train.torch import get_device

            device = get_device()
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
            torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
        return stages.work(config, job["stages"], device, local_rank=context.get_local_rank(), gauges=True, report=ray.train.report)
    except UserError as error:
        # Its message is all that there is to say: no traceback from Ray, and a type that survives the way to the driver.
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        raise UserError(str(error)) from None


class Trainer(DataParallelTrainer):
    """Ray Train's trainer with the project's policies, and without helper actors that a run of one job does not need."""

    config: Config
    """Of the run; to be set before `fit`."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        scaling: Any = self.scaling_config
        limits: Any = self.run_config.failure_config
        own: dict[str, Any] = {"failure_policy": failures.FailurePolicy(limits, RunPaths.of(self.config).checkpoints,
                                                                        failures.planned(self.config)),
                               "scaling_policy": (Elastic if scaling.elasticity_enabled else FixedSize)(scaling)}
        return super()._initialize_and_run_controller(**{**arguments, **own})

    def _create_default_callbacks(self) -> list[Any]:
        """Without the manager of Ray Datasets (an actor of 200 MB; there are none), and without the placement group cleaner: the group
        ends with the job, and the cleaner does not find its cluster if several Ray instances run on one machine (`make try` beside
        `make up`)."""
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, unused)]


def connect(config: Config) -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine for this run."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # an actor of 200 MB; SIGTERM says the same (trainer/train/stop.py)
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
        return
    root = str(stages.root())
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    resources = config.resources
    cpus = max(resources.workers * resources.cpus_per_worker, resources.prepare_cpus)
    for left in (2, 1, 0):
        try:
            ray.init(address="local", num_cpus=math.ceil(cpus), object_store_memory=80 << 20, include_dashboard=False, log_to_driver=True,
                     logging_level=logging.WARNING)
            return
        except Exception as error:  # Ray gives its node 30 s to start and raises a plain Exception
            if not left or "timed out" not in str(error):
                raise
            print(f"Ray did not start in time (the machine is busy); trying again. {str(error).splitlines()[0]}", flush=True)
            ray.shutdown()


def needs(config: Config) -> dict[str, float]:
    """What one worker takes of a node."""
    resources = config.resources
    return {"CPU": resources.cpus_per_worker} | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {})


def room(config: Config) -> int:
    """Workers that the nodes that are there now can hold."""
    return fits(living_nodes(), needs(config))


def wait_for_workers(config: Config, every_s: float = 15.0) -> None:
    """Until the cluster can hold the run's workers; says what it waits for."""
    resources = config.resources
    least = resources.min_workers or resources.workers
    said = float("-inf")
    while (there := room(config)) < least:
        if time.monotonic() - said >= every_s:
            said = time.monotonic()
            what = " and ".join(f"{amount:g} {kind}" for kind, amount in needs(config).items())
            print(f"Waiting for Ray workers: room for {there} of {least} ({what} each). See: kubectl get pods -l ray.io/node-type=worker",
                  flush=True)
        time.sleep(1.0)


def prepare(config: Config) -> None:
    """The dataset, in a task on a worker node (the driver's node has no CPUs and little memory)."""
    largest = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
    cpus = min(config.resources.prepare_cpus, largest)
    task = ray.remote(_prepare).options(num_cpus=cpus, max_retries=3, name="prepare", runtime_env=QUIET)
    try:
        ray.get(task.remote(to_dict(config)))
    except ray.exceptions.RayTaskError as error:  # its own text is the worker's traceback
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    except (ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError) as error:
        why = "its node ran out of memory" if isinstance(error, ray.exceptions.OutOfMemoryError) else (
            "it ended without a word; its pod may lack memory (kubectl describe pod says OOMKilled)")
        raise UserError(f"The dataset could not be prepared, also not when tried again: {why}. Raise the worker's memory, or give the run "
                        "a smaller dataset (run.data.max_rows).") from None


def _prepare(document: dict[str, Any]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(message)s", force=True)
    try:
        stages.prepare(stages.from_document(document))
    except UserError as error:
        raise UserError(str(error)) from None


def fit(config: Config, names: Sequence[str]) -> Any:
    """Stages of the worker group, started again after losses. Raises UserError, or Ray's TrainingFailedError when it gives up."""
    resources = config.resources
    paths = RunPaths.of(config)
    elastic = 0 < resources.min_workers < resources.workers
    scaling = ScalingConfig(num_workers=(resources.min_workers, resources.workers) if elastic else resources.workers,
                            use_gpu=bool(resources.gpus_per_worker), resources_per_worker=needs(config))
    run: Any = RunConfig(name=config.run_id, storage_path=str(paths.ray),
                              failure_config=FailureConfig(max_failures=resources.max_failures),
                              worker_runtime_env=QUIET, logging_config=LoggingConfig(log_level="ERROR"))
    trainer = Trainer(_worker, train_loop_config={"config": to_dict(config), "stages": list(names)},
                      backend_config=ProcessGroup(bool(resources.gpus_per_worker)), scaling_config=scaling, run_config=run)
    trainer.config = config
    try:
        return trainer.fit()
    except TrainingFailedError as error:
        if (cause := failures.user_error(error)) is not None:
            raise UserError(str(cause)) from None
        raise


def run(config: Config) -> dict[str, Any]:
    """All stages; returns the report. A run that is done returns at once. Raises UserError, TrainingFailedError."""
    paths = RunPaths.of(config)
    if paths.config.exists():
        stages.write_run(config, paths)
        if (report := stages.finished(paths)) is not None:
            return report
    if not Path(config.storage).is_dir():
        raise UserError(f"storage: {config.storage} does not exist. Mount the shared storage there, or give another directory with "
                        "--storage.")
    with Lock(paths.lock, lost=_lost):
        stages.write_run(config, paths)
        Progress(paths.progress).update("prepare", 0.0, "starting")
        print(f"Run {config.run_id} in {paths.root}", flush=True)
        with Follower(paths.progress):
            connect(config)
            wait_for_workers(config)
            prepare(config)
            fit(config, stages.WORK)
            report = stages.finished(paths)
            if report is None:
                raise RuntimeError(f"the stages ended, but {paths.report('json')} is not whole")
            Progress(paths.progress).update("done", 100.0)
    return report


def single(config: Config, stage: str) -> None:
    """One stage alone. In this process where that suffices, else in a worker group. Raises UserError, TrainingFailedError."""
    paths = RunPaths.of(config)
    with Lock(paths.lock, lost=_lost):
        stages.write_run(config, paths)
        if stage == "prepare":
            stages.prepare(config)
        elif stage in ("export", "report") or config.resources.workers == 1:
            _alone(config, stage)
        else:
            with Follower(paths.progress):
                connect(config)
                wait_for_workers(config)
                fit(config, [stage])


def _alone(config: Config, stage: str) -> None:
    """A stage with this process as the only worker."""
    import torch
    import torch.distributed as dist

    from trainer.train import stop

    gpu = bool(config.resources.gpus_per_worker) and stage in ("train", "evaluate")
    if gpu and not torch.cuda.is_available():
        raise UserError("resources.gpus_per_worker: 1, but this machine has no usable GPU. Give 0 to compute on the CPU.")
    stop.install()
    if stage == "train":  # FSDP wants a process group of one, too
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        stages.work(config, [stage], torch.device("cuda", 0) if gpu else torch.device("cpu"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _lost() -> None:
    """Another process has taken over the run: end this one, and with it its workers."""
    print("This process stood still for so long that another one has taken the run over. It ends.", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
