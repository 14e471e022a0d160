"""Bytes that a step moves between workers, inside nodes and between them.

A ring collective over W workers lets every link carry (W-1)/W of the data (all-gather, reduce-scatter) or twice that (all-reduce). A
ring over several nodes crosses each node's network card once in either direction, however many workers the node has; hybrid sharding
sends one ring a worker of the node, each with that worker's share.

Between nodes, per optimizer step with M micro-batches and P parameters (weights in c bytes, gradients in r bytes):

    flat, stage 3 (weights dropped after use)      M x (2 c P + r P)        FSDP and ZeRO-3 reduce each micro-batch
    flat, stage 2 (weights gathered once)          c P + M x r P
    flat, stage 1                                  c P + r P                gradients are kept whole until the last micro-batch
    hybrid (sharded inside nodes)                  2 r P                    once a step, whatever M
    adapters                                       2 r P_adapters           once a step
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.plan.workload import Workload


@dataclass(frozen=True)
class Traffic:
    """Bytes through one worker's link inside its node, and through one node's network card in one direction."""

    node_micro: float
    """Inside the node, each micro-batch."""
    node_step: float
    """Inside the node, once a step."""
    wire_micro: float
    """Between nodes, each micro-batch."""
    wire_step: float
    """Between nodes, once a step."""
    collectives_micro: int
    """Collectives between nodes, each micro-batch."""
    collectives_step: int
    """Collectives between nodes, once a step."""
    ring: int
    """Workers in the ring between nodes."""

    def wire(self, micro_batches: int) -> float:
        """Bytes through a node's network card in one direction, a step."""
        return self.wire_micro * micro_batches + self.wire_step


def traffic_of(load: Workload, nodes: int) -> Traffic:
    """What a step of this work moves with its workers on `nodes` nodes."""
    p, c, r = load.model.parameters, load.compute_bytes, load.reduce_bytes
    world, pieces = load.shards * load.replicas, load.model.layers + 3
    ring = (world - 1) / world
    if load.engine == "replicated" or (load.adapters and load.stage < 3):
        moved = 2 * r * load.trained * ring
        return Traffic(0, moved, 0, moved if nodes > 1 else 0, 0, 1, world)
    inside = (load.shards - 1) / load.shards
    reduced = 0 if load.adapters else r * p
    repeated = {1: 0, 2: reduced, 3: 2 * c * p + reduced}[load.stage] * inside
    once = {1: c * p + reduced, 2: c * p, 3: 0}[load.stage] * inside
    if load.replicas == 1:
        collectives = {1: (0, 2 * pieces), 2: (pieces, pieces), 3: (3 * pieces, 0)}[load.stage]
        return Traffic(repeated, once, repeated if nodes > 1 else 0, once if nodes > 1 else 0, *collectives, world)
    between = 2 * (load.replicas - 1) / load.replicas * r * p
    return Traffic(repeated, once, 0, between, 0, pieces, load.replicas)
