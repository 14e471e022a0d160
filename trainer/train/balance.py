"""Unequal GPUs: how many tokens each rank's micro-batches hold, in proportion to its measured speed.

At the start each rank times one decoder layer of the run's model on its own device; from everyone's tokens per second follow the
budgets: with equal numbers of micro-batches a step, a rank that is twice as fast gets micro-batches twice as long, so that all arrive
at the reduction together. Gradients stay exact (the loss is divided by the step's trained tokens over all ranks). Measured again now
and then, the same probe tells whether ranks drift (a GPU that throttles, a neighbour on the node).

Everything but the probe is a pure function of numbers that all ranks hold, so that all ranks decide the same.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.config import Config, check

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig

MULTIPLE = 128
"""Micro-batches on GPUs are multiples of this many tokens: whole tiles of the matrix products."""
NOISE = 0.03
"""Speeds that differ by less than this share are the same: one type of GPU, timed with noise. Equal shapes then stay equal."""


def harmonised(speeds: Sequence[float], noise: float = NOISE) -> list[float]:
    """Speeds with those that lie within `noise` of each other replaced by their common mean, fastest group first."""
    order = sorted(range(len(speeds)), key=lambda r: -speeds[r])
    out, group = [0.0] * len(speeds), [order[0]]
    for rank in [*order[1:], -1]:
        if rank >= 0 and speeds[rank] >= speeds[group[0]] * (1 - noise):
            group.append(rank)
            continue
        mean = statistics.fmean(speeds[r] for r in group)
        for r in group:
            out[r] = mean
        group = [rank]
    return out


def micro_budgets(speeds: Sequence[float], total: int, limits: Sequence[int], least: int, multiple: int = 1) -> list[int]:
    """Tokens of one micro-batch of each rank: `total` dealt in proportion to `speeds`.

    At most `limits[rank]` (its memory), at least `least` (the longest row), multiples of `multiple` (but for `least`, which is
    rounded up). The sum is the nearest that the multiples allow, never above `total` by more than the minima ask. What a limit
    leaves over goes to the others in proportion. Ranks of equal speed and limit get equal budgets.

    Raises ConfigError if a limit is below `least`.
    """
    floor = math.ceil(least / multiple) * multiple
    tops = [limit // multiple * multiple for limit in limits]
    for rank, top in enumerate(tops):
        check(top >= floor, "run.train.micro_batch_tokens", limits[rank],
              f"Rank {rank} must be able to hold the longest row ({least} tokens, rounded up to {floor}).")
    speeds = harmonised(speeds)
    fixed: dict[int, int] = {}
    while True:  # proportional shares; ranks outside their bounds are fixed at the bound, the rest is dealt anew
        free = [r for r in range(len(speeds)) if r not in fixed]
        if not free:
            return [fixed[r] for r in range(len(speeds))]
        rest, speed = max(total - sum(fixed.values()), 0), sum(speeds[r] for r in free)
        share = {r: rest * speeds[r] / speed for r in free}
        low = {r: floor for r in free if share[r] < floor}
        high = {r: tops[r] for r in free if share[r] > tops[r]}
        excess, missing = sum(share[r] - tops[r] for r in high), sum(floor - share[r] for r in low)
        if not low and not high:
            break
        fixed |= high if excess >= missing else low
    # Largest remainders, a whole class of equal ranks at a time: equal ranks keep one compiled shape.
    out = {r: int(share[r] // multiple) * multiple for r in free} | fixed
    classes: dict[tuple[float, int], list[int]] = {}
    for r in free:
        classes.setdefault((speeds[r], tops[r]), []).append(r)
    for members in sorted(classes.values(), key=lambda c: -(share[c[0]] - out[c[0]])):
        if all(out[r] + multiple <= tops[r] for r in members) and sum(out.values()) + multiple * len(members) <= total + multiple // 2:
            for r in members:
                out[r] += multiple
    return [out[r] for r in range(len(speeds))]


def step_budgets(speeds: Sequence[float], tokens_per_step: int, limits: Sequence[int], least: int, multiple: int = 1) -> list[list[int]]:
    """Budgets of a step, `[rank][micro-batch]`: as few micro-batches as the limits allow, the same number on every rank.

    `limits`: tokens that each rank can hold at once, in the order of the ranks. The step holds `tokens_per_step` as nearly as the
    multiples and the longest row (`least`) allow.
    """
    usable = _balanced_capacity(speeds, limits)
    count = max(1, math.ceil(tokens_per_step / usable - 0.01))  # a hundredth is not worth a pass of its own
    budgets = micro_budgets(speeds, round(tokens_per_step / count), limits, least, multiple)
    return [[budget] * count for budget in budgets]


def _balanced_capacity(speeds: Sequence[float], limits: Sequence[int]) -> float:
    """Most tokens of one pass of all ranks that is still dealt in proportion: the first rank to reach its limit bounds it."""
    speeds = harmonised(speeds)
    return sum(speeds) * min(limit / speed for limit, speed in zip(limits, speeds, strict=True))


def budgets_by_speed(config: Config, speeds: Sequence[float], on_gpu: bool) -> list[list[int]]:
    """Budgets of a run, `[rank][micro-batch]`: run.train.tokens_per_step a step, at most run.train.micro_batch_tokens at once."""
    train = config.run.train
    return step_budgets(speeds, train.tokens_per_step, [train.micro_batch_tokens] * len(speeds), config.run.data.max_tokens,
                        MULTIPLE if on_gpu else 1)


class SpeedProbe:
    """Times one decoder layer of the run's model, forward and backward, on this rank's device alone.

    The engine itself cannot tell a rank's speed: where weights are sharded, its gathers wait for the slowest. The layers are nearly
    all of a step's work. Takes the memory of one layer with its gradients, kept between measurements.
    """

    def __init__(self, target: LlamaConfig, dtype: torch.dtype, device: torch.device, compile_layer: bool) -> None:
        """`target`: trainer.model.load.model_config; `compile_layer`: run.engine.compile."""
        import copy

        import torch
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        from trainer.model.attention import PACKED

        own = copy.deepcopy(target)
        own._attn_implementation_internal = PACKED
        self.device, self.dtype, self.width = device, dtype, own.hidden_size
        with torch.device(device):
            self._rotary = LlamaRotaryEmbedding(own)
            self._layer = LlamaDecoderLayer(own, 0).to(dtype)
        for parameter in self._layer.parameters():  # zeros and ones would be faster than real weights: less power is drawn
            torch.nn.init.normal_(parameter, std=0.02)
        compiled = compile_layer and device.type == "cuda"
        self._forward = torch.compile(self._layer, fullgraph=True, dynamic=False) if compiled else self._layer

    def measure(self, tokens: int, row_tokens: int, warm: int = 2, repeats: int = 5) -> float:
        """Tokens per second of a micro-batch of `tokens` tokens in rows of `row_tokens`. Not collective."""
        import torch

        borders = [*range(0, tokens, row_tokens), tokens]
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=self.device)
        positions = (torch.arange(tokens, device=self.device) % row_tokens)[None]
        hidden = torch.randn(1, tokens, self.width, device=self.device, dtype=self.dtype, requires_grad=True)
        rotary = self._rotary(hidden, positions)
        spent = []
        for turn in range(warm + repeats):
            self._wait()
            began = time.perf_counter()
            out = self._forward(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary, use_cache=False,
                                cu_seq_lens_q=cu_seqlens, max_length_q=row_tokens)
            out.backward(hidden)
            self._wait()
            if turn >= warm:
                spent.append(time.perf_counter() - began)
            self._layer.zero_grad(set_to_none=True)
            hidden.grad = None
        return tokens / statistics.median(spent)

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class Drift:
    """Watches whether the ranks still take the same time, and says when to calibrate again.

    Each rank's speed (SpeedProbe) is compared with that at calibration. A rank drifts if its median over `window` measurements lies
    `tolerance` off what the median rank's does: a change that all share (a warmer room) needs no new budgets.
    """

    speeds: Sequence[float]
    """Tokens per second at calibration, by rank."""
    tolerance: float = 0.1
    window: int = 3
    _seen: list[list[float]] = field(default_factory=list)

    def observe(self, speeds: Sequence[float]) -> list[int]:
        """A measurement of every rank. Returns the ranks that have drifted (none while the window fills)."""
        self._seen.append([now / then for now, then in zip(speeds, self.speeds, strict=True)])
        if len(self._seen) < self.window:
            return []
        ratios = [statistics.median(step[r] for step in self._seen) for r in range(len(self.speeds))]
        self._seen.clear()
        middle = statistics.median(ratios)
        return [r for r, ratio in enumerate(ratios) if abs(ratio / middle - 1) > self.tolerance]
