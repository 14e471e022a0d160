"""Lost workers: what is tried again and how often, and what is said about it.

Everything here but `planned` works in Ray Train's controller, one process for the whole run of a driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision

from trainer.config import Config
from trainer.errors import UserError
from trainer.memory import Container

GIB = 1 << 30
GIVEN_UP = "Given up: "
"""Begins the message of an error that the controller hands to the driver: beside the workers' errors, the message alone is pickled."""

_pods: dict[int, Container] = {}
"""Each rank's container, as it was when the workers last started."""
_killed: dict[str, int] = {}
"""Processes that the kernel had killed in a container for want of memory when the run first used it."""


def started(containers: Sequence[Container]) -> None:
    """Take note of the workers' containers, by rank; say which of them have lost a process for want of memory since the run began."""
    for rank, now in enumerate(containers):
        before = _pods.get(rank)
        since = before.killed if before is not None and before.name == now.name else _killed.setdefault(now.name, now.killed)
        _pods[rank] = now
        if now.killed > since:
            print(f"The kernel has killed {now.killed - since} process(es) of worker {rank}'s pod {now.name} because the pod's memory "
                  f"limit of {now.limit / GIB:.1f} GiB was reached.", flush=True)


def planned(config: Config) -> str:
    """What the plan says about a worker's memory on its host, for a message; empty if it cannot be planned."""
    from trainer.plan import plan
    from trainer.plan.memory import host_bytes

    try:
        groups = plan(config).groups
    except UserError:
        return ""
    most = max(host_bytes(g.load, 1) + (0 if config.resources.gpus_per_worker else g.memory.total) for g in groups)
    return f"by `python -m trainer plan` a worker holds {most / GIB:.1f} GiB beside its processes' own"


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError inside what Ray wraps around it, if there is one."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        e = queue.pop()
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        if isinstance(e, UserError):
            return e
        queue += [*getattr(e, "worker_failures", {}).values(), getattr(e, "_base_exc", None), getattr(e, "cause", None),
                  getattr(e, "controller_failure", None), e.__cause__]
    return None


def describe(error: BaseException, need: str = "", final: bool = False) -> str:
    """One line on why a worker group was lost. `need`: what `planned` says. `final`: with what to look at where the cause is not known."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    parts = []
    for rank, failure in sorted(failures.items()):
        base = getattr(failure, "_base_exc", None) or getattr(failure, "health_check_failure", failure)
        if said := _memory(rank, base, need, final):
            parts.append(f"worker {rank} {said}")
        else:
            lines = [line.strip() for line in str(base).splitlines() if line.strip()]
            parts.append(f"worker {rank}: {type(base).__name__}: {lines[0] if lines else ''}")
    return "; ".join(parts) or str(getattr(error, "controller_failure", None) or error).splitlines()[0]


def reason(error: BaseException, config: Config) -> str:
    """Why a run was given up, for its driver: what the controller found, which alone knows the workers' pods."""
    message = str(getattr(error, "_error_message", ""))
    return message.removeprefix(GIVEN_UP) if message.startswith(GIVEN_UP) else describe(error, planned(config), final=True)


def _memory(rank: int, failure: BaseException, need: str, final: bool) -> str:
    """What a worker's end has to do with memory: certain (Ray's own monitor says so, or the kernel has killed in this pod before), or,
    if `final`, possible (it ended without a word, as when its pod is killed). Else empty."""
    pod = _pods.get(rank)
    dead = isinstance(failure, RayActorError)
    by_ray = "OutOfMemory" in type(failure).__name__ or "memory pressure" in str(failure)
    by_kernel = dead and pod is not None and pod.killed > _killed.get(pod.name, 0)
    if not (by_ray or by_kernel or (dead and final)):
        return ""
    limit = [f"the memory limit of its pod {pod.name} is {pod.limit / GIB:.1f} GiB"] if pod is not None and pod.limit else []
    remedy = "; ".join([*limit, need or "`python -m trainer plan` says what the run needs",
                        "raise the worker's memory or lower run.train.micro_batch_tokens"])
    if by_ray or by_kernel:
        return f"was killed because its {'node' if by_ray else 'pod'} ran out of memory ({remedy})"
    return f"ended without a word; if `kubectl describe pod` says OOMKilled, its memory is too small ({remedy})"


class FailurePolicy(DefaultFailurePolicy):
    """Start again after a lost worker, at most `max_failures` times without a new checkpoint in between; never after an error that only
    the user can mend.

    So a run of weeks may lose a worker each day, and one that dies at the same place again and again ends. A worker that was asked to
    end and saved its state (preemption) does not count; one that dies while it starts does. Waiting for workers has no limit.
    """

    def __init__(self, failure_config: Any, checkpoints: Path | None = None, need: str = "") -> None:
        """`checkpoints`: where new ones show that the run gets on. `need`: what `planned` says."""
        super().__init__(failure_config)
        self._checkpoints, self._need = checkpoints, need
        self._reached = self._newest()

    def _newest(self) -> int:
        """Step of the newest checkpoint; -1 if there is none, or the storage does not answer."""
        try:
            names = [] if self._checkpoints is None else [path.name for path in self._checkpoints.glob("step-*")]
        except OSError:
            return -1
        return max((int(step) for name in names if (step := name.removeprefix("step-")).isdecimal()), default=-1)

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if user_error(training_failed_error) is not None:
            return FailureDecision.RAISE
        failures = getattr(training_failed_error, "worker_failures", {})
        preempted = any(type(getattr(f, "_base_exc", f)).__name__ == "Preempted" for f in failures.values())
        if (newest := self._newest()) > self._reached:
            self._reached, self._worker_group_failures = newest, 0
        count, decision = "", FailureDecision.RETRY
        if not preempted:
            decision = super().make_decision(training_failed_error)
            at_start = isinstance(getattr(training_failed_error, "controller_failure", None), WorkerGroupStartupFailedError)
            most = self.failure_config.max_failures
            if at_start:
                self._worker_group_failures += 1
                decision = FailureDecision.RAISE if self._worker_group_failures > most else decision
            if at_start or failures:
                count = f" (loss {self._worker_group_failures} since the last new checkpoint, at most {most} are mended)"
        given_up = decision != FailureDecision.RETRY
        why = describe(training_failed_error, self._need, given_up)
        if given_up and isinstance(training_failed_error, WorkerGroupError):
            training_failed_error._error_message = GIVEN_UP + why
        print(f"The workers stopped{count}: {why}. "
              + ("Giving up." if given_up else "Starting again from the last checkpoint."), flush=True)
        return decision

    def _log_decision(self, *_: Any) -> None:
        """`make_decision` says it in one line."""
