"""Seconds of a step on one worker, from its work and its hardware.

    micro-batch = matrix products / (peak x efficiency)  +  element-wise work / memory bandwidth  +  attention
                  + casting and copying gathered weights and gradients / memory bandwidth  +  communication that is not hidden
    step        = micro-batches  +  optimizer's bytes / memory bandwidth  +  communication once a step that is not hidden

Constants are fitted to measured steps on H100 and H200 (tests/trainer/test_plan_baseline.py: all within 10%); for other GPUs the same
constants are used with their own peaks and bandwidths. Offload and 4-bit figures are estimates from published bandwidths (4-bit on one
H200 was measured 2% above for a 7B and 18% below for a 70B).
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.plan.hardware import Gpu
from trainer.plan.network import Traffic
from trainer.plan.workload import Workload

PASSES = 8.6
"""Element-wise work of a compiled layer, forward and backward: times that a token's kept activations cross the memory bus."""
EAGER_PASSES = 17.0
"""More of them without compilation."""
ADAPTER_PASSES = 6.3
"""More of them with adapters: low-rank products are bound by memory."""
STREAM = 0.65
"""Share of the memory bandwidth that copies and the optimizer reach."""
GATHER_BYTES, REDUCE_BYTES = 9, 7
"""Bytes a parameter to cast and copy sharded weights when they are gathered, and gradients when they are reduced."""
ACCUMULATE_BYTES = {4: 10, 2: 6}
"""Bytes a parameter and micro-batch to add whole gradients up, by the bytes of the sum's numbers (weights whole on the worker)."""
ADAM_BYTES = 28
"""Bytes a parameter that AdamW reads and writes."""
ZERO_BYTES = 32
"""More bytes a parameter and step in DeepSpeed: half over whole gradients and weights, half over the partition."""
FP8_FACTOR = {"none": 1.0, "tensorwise": 0.64, "rowwise": 1.0}
"""Time of matrix products against bf16, scaling included (measured on H200; rowwise gained nothing)."""
ATTENTION_EFFICIENCY = 0.5
"""Share of the bf16 peak that varlen attention reaches on short rows."""
LINK_EFFICIENCY = 0.75
"""Share of NVLink's or PCIe's bandwidth that NCCL reaches."""
WIRE_EFFICIENCY = 0.80
"""Share of the network's bandwidth that NCCL reaches between nodes (assumed: RDMA; NCCL over TCP reaches less)."""
CONTENTION = 0.2
"""Communication holds the computation up by at least this part of its time, though it overlaps (measured on NVLink)."""
HIDDEN = 0.8
"""Share of the computation behind which communication can hide (assumed)."""
HOP_SECONDS = 8e-6
"""Latency of a ring's step between nodes (assumed)."""
HOST_BANDWIDTH = 150e9
"""Memory bandwidth of a host's sockets that the CPU's AdamW reaches, shared by a node's workers, bytes/s (assumed)."""
NVME_BANDWIDTH = 6e9
"""A node's NVMe, read and write each, bytes/s (assumed)."""
DEQUANTISE = 2 * (0.52 + 2.0) / 0.5
"""Bytes of bandwidth a 4-bit weight and micro-batch: read, write as bf16, forward and backward, at half the bandwidth."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on one worker."""

    compute: float
    """Matrix products, attention and element-wise work."""
    copies: float
    """Casting and copying weights and gradients."""
    optimizer: float
    """AdamW, and traffic to where its state lives."""
    network: float
    """Communication that is not hidden."""

    @property
    def total(self) -> float:
        """The step."""
        return self.compute + self.copies + self.optimizer + self.network


def recomputed(load: Workload) -> float:
    """Share of the forward pass that is computed twice. The compiler recomputes the cheapest first: at a budget of 0.6 some 14%."""
    if load.kept == 1:
        return 0.0
    return (1 - load.kept) ** 2.15 if load.compiled else 1 - load.kept


def flops_a_token(load: Workload) -> float:
    """Floating-point operations of the layers' linear parts a token, forward and backward, with recomputation."""
    linear = load.model.layers * load.model.layer_linear
    backward = 2 * linear if load.adapters else 4 * linear
    return 2 * linear * (1 + recomputed(load)) + backward + 6 * (load.trained if load.adapters else 0)


def token_seconds(load: Workload, gpu: Gpu) -> float:
    """Seconds that a token takes, without what a micro-batch or a step costs whatever its size."""
    m, peak, bandwidth = load.model, gpu.bf16_tflops * 1e12, gpu.bandwidth_gbs * 1e9
    if load.compute_bytes == 4:
        peak /= 2  # TF32
    products = flops_a_token(load) / (peak * gpu.efficiency) * FP8_FACTOR[load.float8]
    passes = PASSES + (0 if load.compiled else EAGER_PASSES) + (ADAPTER_PASSES if load.adapters else 0)
    width = load.compute_bytes * (5 * m.hidden + 2 * m.q_dim + 3 * m.kv_dim + 3 * m.ffn)
    elementwise = m.layers * passes * width * (1 + recomputed(load) / 3) / bandwidth
    attention = m.layers * 7 * m.q_dim * load.row_tokens * (1 + recomputed(load) / 3.5) / (peak * ATTENTION_EFFICIENCY)
    head = 8 * m.embedding * load.answer_share / (peak * gpu.efficiency)
    return products + elementwise + attention + head


def exposed(communication: float, computation: float) -> float:
    """Seconds of communication that the step waits for."""
    return max(CONTENTION * communication, communication - HIDDEN * computation)


def step_time(load: Workload, gpu: Gpu, traffic: Traffic, network_gbps: float, node_workers: int) -> StepTime:
    """Seconds of one step on this worker, if all others keep pace. `network_gbps` 0: traffic between nodes takes no time."""
    n, bandwidth = load.model.parameters, gpu.bandwidth_gbs * 1e9 * STREAM
    compute = load.tokens * token_seconds(load, gpu)
    copies = 0.0
    if load.engine != "replicated" and not load.adapters:
        stage, once = load.stage if load.engine == "fsdp" else 3, 1 / load.micro_batches  # a micro-batch's part of what is done once a step
        moved = GATHER_BYTES * (2 if stage == 3 else once) + REDUCE_BYTES * (once if stage == 1 else 1)
        if stage == 1 and load.micro_batches > 1:
            moved += ACCUMULATE_BYTES[load.reduce_bytes]
        copies = moved * n / bandwidth
    elif not load.adapters:
        copies = ACCUMULATE_BYTES[load.gradient_bytes] * n / bandwidth
    if load.method == "qlora":
        copies += load.model.layers * load.model.layer_linear * DEQUANTISE * (1 + recomputed(load) / 2) / (gpu.bandwidth_gbs * 1e9)
    optimizer = ADAM_BYTES * load.trained / load.shards / bandwidth
    if load.engine == "deepspeed" and not load.adapters:
        optimizer += ZERO_BYTES * n * (0.5 + 0.5 / load.shards) / bandwidth
    if load.offload != "none":
        share = n / load.shards
        optimizer = 8 * share / (gpu.pcie_gbs * 1e9 * LINK_EFFICIENCY) + ADAM_BYTES * share * node_workers / HOST_BANDWIDTH
        if load.engine == "fsdp":
            copies += 8 * share / (gpu.pcie_gbs * 1e9 * LINK_EFFICIENCY)  # weights come from the host for forward and for backward
        if load.offload == "nvme":
            optimizer += 12 * share * node_workers / NVME_BANDWIDTH * 2
    link = gpu.link_gbs * 1e9 * LINK_EFFICIENCY
    wire = network_gbps / 8 * 1e9 * WIRE_EFFICIENCY
    hops = HOP_SECONDS * (traffic.ring - 1)

    def seconds(node: float, between: float, collectives: int) -> float:
        slow = between / wire + collectives * hops if wire and between else 0.0
        return max(node / link, slow)

    network = load.micro_batches * exposed(seconds(traffic.node_micro, traffic.wire_micro, traffic.collectives_micro), compute)
    # What crosses once a step overlaps with the last micro-batch's backward pass at most.
    once = seconds(traffic.node_step, traffic.wire_step, traffic.collectives_step)
    network += once if load.engine == "replicated" else exposed(once, compute * 2 / 3)
    return StepTime(compute * load.micro_batches, copies * load.micro_batches, optimizer, network)
