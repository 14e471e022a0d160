"""How many workers a run has: always the same number, or what the cluster holds between two bounds (resources.min_workers, workers).

Ray Train asks these policies in its controller. Its own elastic policy goes through an actor of Ray Data (200 MB) and, to grow, ends the
workers without a word, so that the steps since the last checkpoint are done again. Here the nodes are counted, and workers that are to
become more are asked to save and end, as when a pod is drained.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy


def fits(nodes: Iterable[Mapping[str, float]], one: Mapping[str, float]) -> int:
    """Workers that need `one` each that nodes with these resources hold."""
    return sum(int(min(node.get(kind, 0.0) // amount for kind, amount in one.items())) for node in nodes)


def living_nodes() -> list[dict[str, float]]:
    """Resources of each node of the cluster, used or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def free_nodes() -> list[dict[str, float]]:
    """What of them is not used."""
    from ray._private.state import available_resources_per_node

    return list(available_resources_per_node().values())


class FixedSize(FixedScalingPolicy):
    """A worker group of one size, without the actor that Ray Train asks for more nodes through: the pending placement group does."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nothing to register."""

    def _maybe_send_resource_request(self) -> None:
        """Nothing to renew."""


class Elastic(FixedSize):
    """As many workers as there is room for, up to the most; after a loss with fewer only if the rest does not come back in time.

    `elastic_resize_monitor_interval_s` of the scaling configuration is that time, and the time between two looks for more room.
    """

    def __init__(self, scaling_config: Any) -> None:
        super().__init__(scaling_config)
        self._waiting_since: float | None = None
        self._looked_at = 0.0
        self._room_seen = 0

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """How many to start with now, or to wait."""
        now, one = time.monotonic(), self.scaling_config._resources_per_worker_not_none
        self._waiting_since = now if self._waiting_since is None else self._waiting_since
        most, least = self.scaling_config.max_workers, self.scaling_config.min_workers
        there = min(fits(living_nodes(), one), most)
        if there < least or (there < most and now - self._waiting_since < self.scaling_config.elastic_resize_monitor_interval_s):
            return NoopDecision()
        if there < most:
            print(f"There is room for {there} of {most} workers: the run goes on with them (resources.min_workers: {least}).", flush=True)
        self._waiting_since = None
        return ResizeDecision(num_workers=there, resources_per_worker=one)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> ScalingDecision:
        """Asks the workers to save and end if more have found room at two looks in a row."""
        now, running = time.monotonic(), worker_group_state.num_workers
        since = max(worker_group_state.start_time, self._looked_at)
        if running >= self.scaling_config.max_workers or now - since < self.scaling_config.elastic_resize_monitor_interval_s / 2:
            return NoopDecision()
        self._looked_at = now
        room, seen = fits(free_nodes(), self.scaling_config._resources_per_worker_not_none), self._room_seen
        self._room_seen = room
        if room and seen:
            self._room_seen = 0
            print(f"There is room for {room} more workers: the {running} that run save their state and start again with them.", flush=True)
            worker_group_state.workers[0].execute_async(_ask_to_end)
        return NoopDecision()


def _ask_to_end() -> None:
    """In a worker: as SIGTERM does. All workers end, after the same step; when they do not train, nothing happens."""
    from trainer.train import stop

    stop.requested.set()
