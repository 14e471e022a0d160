"""Memory of one worker, by part, at the moment of the step that needs most.

Two moments are compared. When the backward pass starts, all kept activations exist and (with one micro-batch) no gradients yet; when
it ends, all gradients exist and the activations of one layer. Constants are fitted to measured peaks of `torch.cuda`'s allocator
(tests/trainer/test_plan_baseline.py has the runs; all within 15%).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from trainer.plan.hardware import GIB
from trainer.plan.workload import Workload

CONTEXT = int(1.5 * GIB)
"""CUDA context, cuBLAS workspaces and NCCL buffers, outside the allocator."""
FRAGMENTATION = 0.06
"""Share of the memory left free for what the allocator cannot use (measured: 64-75 GiB reserved for 57-67 GiB used)."""
KEPT_BY_BUDGET = 0.9
"""torch.compile's knapsack keeps this part of its activation budget: it never exceeds it, and tensors are coarse."""
EAGER = 1.17
"""Activations without torch.compile against with it."""
ADAPTERS = 0.84
"""Activations with adapters against full: inputs of frozen layers are shared by two products, and no norm is trained."""
FLOAT8 = 0.77
"""Activations with FP8 matrix products: their inputs are kept in 8 bits."""
FP8 = 1
"""Bytes of a frozen FP8 weight."""
NF4 = 0.5 + 0.127 / 8
"""Bytes of a 4-bit weight with double quantisation, blocks of 64 (https://arxiv.org/abs/2305.14314)."""
LOGIT_BYTES = 10
"""Bytes of a logit while its loss is taken: bf16, float32, and the float32 gradient."""
ZERO_BUCKETS, ZERO_BUCKET = 3, 5 * 10**8
"""DeepSpeed's reduction and prefetch buckets, and the numbers in each at most (present if there is more than one worker)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: int
    """Weights: sharded master weights, or frozen ones."""
    gradients: int
    """Gradients."""
    optimizer: int
    """AdamW's two moments."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    logits: int
    """Logits of one chunk of trained positions, and the head's gathered weights."""
    buffers: int
    """Gathered layers, gradients on their way, a layer's recomputation, communication buckets."""
    reserve: int
    """CUDA context and fragmentation."""
    moment: str = "start of the backward pass"
    """When the peak is."""

    @property
    def peak(self) -> int:
        """What the allocator hands out at most: all but the reserve."""
        return self.total - self.reserve

    @property
    def total(self) -> int:
        """What a GPU needs to have."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Name to bytes."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "moment"}


def activation_bytes(load: Workload, kept: float) -> float:
    """Bytes a token and decoder layer for the backward pass: `kept` 1 everything, 0 the layer's input only."""
    m, least = load.model, load.compute_bytes * load.model.hidden
    # widths of what autograd keeps: residuals, norms and attention's output; queries before and after rotation; keys and values
    # (keys twice); the MLP's two branches and their product. Fitted: 161 kB for Llama 2 7B.
    most = load.compute_bytes * (6.6 * m.hidden + 2 * m.q_dim + 3 * m.kv_dim + 3 * m.ffn)
    if not load.compiled:
        most *= EAGER
    if load.adapters:
        most *= ADAPTERS
        if load.dropout:
            most += (load.compute_bytes + 1) * (5 * m.hidden + m.q_dim + m.ffn)  # dropped inputs and masks of seven layers
    elif load.float8 != "none":  # adapters need their inputs in the computing type
        most *= FLOAT8
    return least + (most - least) * (kept if kept == 1 else kept * KEPT_BY_BUDGET)


def state_bytes(load: Workload) -> tuple[float, float, float]:
    """(weights, gradients, optimizer) on the GPU, bytes; gradients as they are when the backward pass ends."""
    m, n, s, c, g = load.model, load.trained, load.shards, load.compute_bytes, load.gradient_bytes
    master = 4 if c == 2 else 0
    frozen = 0.0
    if load.adapters:
        linear = m.layers * m.layer_linear
        frozen = linear * (NF4 if load.method == "qlora" else FP8 if load.float8 != "none" else c) + (m.parameters - linear) * c
    if load.engine == "replicated":
        return frozen + (c + master) * n, g * n, 8 * n
    if load.engine == "fsdp":
        # Stage 1 sums whole gradients in the type in which they are sent; their reduced shards take the place of what was sent.
        summed = max(load.reduce_bytes * n, g * n / s) if load.stage == 1 and load.micro_batches > 1 else g * n / s
        return (0, 0, 0) if load.offload == "cpu" else (4 * n / s, summed, 8 * n / s)
    # ZeRO keeps bf16 weights and float32 masters; stage 1 accumulates whole gradients in float32, beside those of the computing type.
    weights = (frozen + c * n) / (s if load.stage == 3 else 1)
    gradients = g * n / s if load.stage > 1 else (g + c) * n
    return (weights, gradients if load.stage == 1 else 0, 0) if load.offload != "none" else (
        weights + 4 * n / s, gradients, 8 * n / s)


def memory_of(load: Workload, gpu_memory: int = 0) -> Memory:
    """Memory of one worker; `gpu_memory` (bytes) decides the reserve for fragmentation."""
    m, c = load.model, load.compute_bytes
    weights, gradients, optimizer = state_bytes(load)
    kept, one = load.tokens * activation_bytes(load, load.kept), load.tokens * activation_bytes(load, 1)
    chunk = min(load.loss_chunk, max(1, round(load.tokens * load.answer_share)))
    gathers = load.engine != "replicated" and (not load.adapters or load.stage == 3)
    layers = 2 * c * m.layer_parameters if gathers else 0  # the layer at work and the one that is fetched ahead
    if load.method == "qlora":
        layers = 2 * c * max(i * o for i, o in m.linears.values())  # a dequantised weight, and the next
    elif load.adapters and load.float8 != "none":
        layers = 2 * FP8 * max(i * o for i, o in m.linears.values())  # a transposed weight, and the next
    stay = c * m.parameters if load.engine == "fsdp" and load.stage < 3 else 0
    bucketed = load.engine == "deepspeed" and load.shards > 1 and not load.adapters
    buckets = ZERO_BUCKETS * min(ZERO_BUCKET, m.parameters) * c if bucketed else 0
    # Gradients on their way: as computed, and as sent. The embedding's come last, the head's first.
    sent = 0 if load.adapters else c + (load.reduce_bytes if load.engine == "fsdp" else 0)
    head = c * m.embedding if gathers else 0
    # FSDP's gradients exist before the backward pass only if an earlier micro-batch left them; the others' buffers always do.
    early = gradients if load.micro_batches > 1 or load.engine != "fsdp" else 0
    reserve = (CONTEXT + int(FRAGMENTATION * gpu_memory)) if gpu_memory else 0
    start = Memory(weights=int(weights), gradients=int(early), optimizer=int(optimizer), activations=int(kept * m.layers),
                   logits=int(max(chunk * m.vocabulary * LOGIT_BYTES, sent * m.embedding) + head),
                   buffers=int(layers + stay + (one - kept) + buckets), reserve=reserve)
    end = Memory(weights=int(weights), gradients=int(gradients), optimizer=int(optimizer), activations=int(one), logits=0,
                 buffers=int(layers + (stay if load.micro_batches > 1 else 0) + sent * max(m.layer_parameters, m.embedding) + buckets
                             + load.tokens * m.hidden * c), reserve=reserve,
                 moment="end of the backward pass")
    return max(start, end, key=lambda memory: memory.total)


def host_bytes(load: Workload, node_workers: int) -> int:
    """Memory of a node's host that the run holds: offloaded state, and the reused buffers of asynchronous checkpoints."""
    staging = 12 * load.trained / load.shards
    # masters, moments and float32 gradients; DeepSpeed receives the gradients in bf16 besides
    offloaded = (18 if load.engine == "deepspeed" else 16) * load.trained / load.shards if load.offload == "cpu" else 0
    return int(node_workers * (staging + offloaded))


def fits(memory: Memory, gpu_memory: int) -> bool:
    """Whether a GPU of `gpu_memory` bytes holds it."""
    return memory.total <= gpu_memory
