"""Unequal GPUs: how many tokens each rank's micro-batches hold, in proportion to its measured speed.

At the start each rank times one decoder layer of the run's model on its own device (SpeedProbe); from everyone's tokens per second
follow the budgets: a rank that is twice as fast gets twice as many tokens a step, so that all arrive at the reduction together.
Gradients stay exact (the loss is divided by the step's trained tokens over all ranks). During the run the steps themselves tell how
fast each rank is (trainer/train/busy.py), and `Rebalance` says when it pays to deal anew.

Everything but the probe is a pure function of numbers that all ranks hold, so that all ranks decide the same.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from trainer.config import Config, check

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig

    from trainer.train.ranks import Ranks

log = logging.getLogger(__name__)

TILE = 128
"""Micro-batches on GPUs are multiples of this many tokens: whole tiles of the matrix products."""
STEPS = 64
"""A micro-batch's length is one of about this many, so that a rank that changes comes back to shapes that are compiled already."""
PROBE_S = 0.5
"""Seconds that the probe measures at least: many periods of whatever shares the device in turns."""


@dataclass(frozen=True)
class Kind:
    """What the kind of device decides."""

    noise: float
    """Speeds that differ by less than this share are the same: one type of device, timed with noise. Equal shapes then stay equal."""
    gain: float
    """New budgets must shorten the step by more than this share."""
    change_s: float
    """Seconds that new budgets cost: their shapes are compiled."""


GPU, CPU = Kind(noise=0.03, gain=0.03, change_s=60.0), Kind(noise=0.15, gain=0.1, change_s=0.0)
"""On CPUs a measurement also tells of the neighbours, which come and go."""


def harmonised(speeds: Sequence[float], noise: float = GPU.noise) -> list[float]:
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


def micro_budgets(speeds: Sequence[float], total: int, limits: Sequence[int], least: int, multiple: int = 1,
                  counts: Sequence[int] = ()) -> list[int]:
    """Tokens of one micro-batch of each rank, so that all of its micro-batches together are its share of `total` by `speeds`.

    `counts`: micro-batches of each rank (none given: one each). At most `limits[rank]` (its memory), at least `least` (the longest
    row), multiples of `multiple` (but for `least`, which is rounded up). The sum is the nearest that the multiples allow. What a limit
    leaves over goes to the others in proportion. Ranks of equal speed, count and limit get equal budgets.

    Raises ConfigError if a limit is below `least`.
    """
    counts = counts or [1] * len(speeds)
    floor = math.ceil(least / multiple) * multiple
    tops = [limit // multiple * multiple for limit in limits]
    for rank, top in enumerate(tops):
        check(top >= floor, "run.train.micro_batch_tokens", limits[rank],
              f"Rank {rank} must be able to hold the longest row ({least} tokens, rounded up to {floor}).")
    fixed: dict[int, int] = {}
    while True:  # proportional shares; ranks outside their bounds are fixed at the bound, the rest is dealt anew
        free = [r for r in range(len(speeds)) if r not in fixed]
        if not free:
            return [fixed[r] for r in range(len(speeds))]
        rest, speed = max(total - sum(counts[r] * b for r, b in fixed.items()), 0), sum(speeds[r] for r in free)
        share = {r: rest * speeds[r] / speed / counts[r] for r in free}
        low = {r: floor for r in free if share[r] < floor}
        high = {r: tops[r] for r in free if share[r] > tops[r]}
        excess, missing = sum(counts[r] * (share[r] - tops[r]) for r in high), sum(counts[r] * (floor - share[r]) for r in low)
        if not low and not high:
            break
        fixed |= high if excess >= missing else low
    # Largest remainders, a whole class of equal ranks at a time: equal ranks keep one compiled shape.
    out = {r: int(share[r] // multiple) * multiple for r in free} | fixed
    classes: dict[tuple[float, int, int], list[int]] = {}
    for r in free:
        classes.setdefault((speeds[r], tops[r], counts[r]), []).append(r)
    for members in sorted(classes.values(), key=lambda c: -(share[c[0]] - out[c[0]])):
        more = multiple * sum(counts[r] for r in members)
        if all(out[r] + multiple <= tops[r] for r in members) and _dealt(out, counts) + more <= total + multiple * max(counts) // 2:
            for r in members:
                out[r] += multiple
    return [out[r] for r in range(len(speeds))]


def _dealt(budgets: dict[int, int], counts: Sequence[int]) -> int:
    return sum(counts[r] * b for r, b in budgets.items())


def step_budgets(speeds: Sequence[float], tokens_per_step: int, limits: Sequence[int], least: int, multiple: int = 1,
                 groups: Sequence[int] = (), noise: float = GPU.noise) -> list[list[int]]:
    """Budgets of a step, `[rank][micro-batch]`: as few micro-batches as the limits allow.

    `limits`: tokens that each rank can hold at once, in the order of the ranks. `groups`: ranks with the same number there hold the
    same number of micro-batches (none given: all), shorter ones on the slower rank; others may hold more or fewer. The step holds
    `tokens_per_step` as nearly as the multiples and the longest row (`least`) allow.
    """
    speeds, groups = harmonised(speeds, noise), groups or [0] * len(speeds)
    passes = [tokens_per_step * speed / sum(speeds) / limit for speed, limit in zip(speeds, limits, strict=True)]
    # A hundredth is not worth a pass of its own.
    counts = [max(1, *(math.ceil(p - 0.01) for p, g in zip(passes, groups, strict=True) if g == group)) for group in groups]
    budgets = micro_budgets(speeds, tokens_per_step, limits, least, multiple, counts)
    return [[budget] * count for budget, count in zip(budgets, counts, strict=True)]


def quantum(config: Config, on_gpu: bool) -> int:
    """Lengths of micro-batches are multiples of this many tokens; the longest row fits the longest of them."""
    limit, least = config.run.train.micro_batch_tokens, config.run.data.max_tokens
    wanted = math.ceil(limit / STEPS / TILE) * TILE if on_gpu else max(1, limit // STEPS)
    while math.ceil(least / wanted) * wanted > limit // wanted * wanted:
        wanted //= 2
    return wanted


def budgets_by_speed(config: Config, speeds: Sequence[float], on_gpu: bool, groups: Sequence[int] = ()) -> list[list[int]]:
    """Budgets of a run, `[rank][micro-batch]`: run.train.tokens_per_step a step, at most run.train.micro_batch_tokens at once."""
    train = config.run.train
    return step_budgets(speeds, train.tokens_per_step, [train.micro_batch_tokens] * len(speeds), config.run.data.max_tokens,
                        quantum(config, on_gpu), groups, (GPU if on_gpu else CPU).noise)


class SpeedProbe:
    """Times one decoder layer of the run's model, forward and backward, on this rank's device alone.

    The engine itself cannot tell a rank's speed: where weights are sharded, its gathers wait for the slowest. The layers are nearly
    all of a step's work. Takes the memory of one layer with its gradients.
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

    def measure(self, tokens: int, row_tokens: int, warm: int = 2, least_s: float = PROBE_S) -> float:
        """Tokens per second of a micro-batch of `tokens` tokens in rows of `row_tokens`, over at least `least_s`. Not collective."""
        import torch

        borders = [*range(0, tokens, row_tokens), tokens]
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=self.device)
        positions = (torch.arange(tokens, device=self.device) % row_tokens)[None]
        hidden = torch.randn(1, tokens, self.width, device=self.device, dtype=self.dtype, requires_grad=True)
        rotary = self._rotary(hidden, positions)
        turns, began = -warm, time.perf_counter()
        while True:
            out = self._forward(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary, use_cache=False,
                                cu_seq_lens_q=cu_seqlens, max_length_q=row_tokens)
            out.backward(hidden)
            self._layer.zero_grad(set_to_none=True)
            hidden.grad = None
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            turns += 1
            if turns == 0:
                began = time.perf_counter()
            elif turns > 2 and time.perf_counter() - began >= least_s:
                return turns * tokens / (time.perf_counter() - began)


@dataclass
class Rebalance:
    """Watches what the ranks' steps take, and says when to deal the tokens anew.

    The speeds of the last steps give the budgets that would be right, and how much shorter the step would be. New budgets must pay
    for what they cost, and must do so over several windows in a row: twice as many after each change, so that a rank whose speed
    goes up and down costs ever fewer compilations.
    """

    deal: Callable[[Sequence[float]], list[list[int]]]
    """Budgets for the ranks' speeds."""
    budgets: list[list[int]]
    """Those of now."""
    kind: Kind
    window: int = 5
    """Steps that are judged together."""
    patience: int = 2
    """Windows in a row that must ask for new budgets."""
    most_patience: int = 32
    _busy: list[list[float]] = field(default_factory=list)
    _asked: int = 0

    def observe(self, busy: Sequence[float], steps_left: int) -> list[list[int]] | None:
        """A step's computing time of every rank, in seconds. Returns new budgets when it is time for them."""
        self._busy.append(list(busy))
        if len(self._busy) % self.window:
            return None
        new, saved = self._better(self._busy[-self.window:])
        self._asked = self._asked + 1 if new != self.budgets and saved * steps_left > self.kind.change_s else 0
        if self._asked < self.patience:
            self._busy = self._busy[-self._asked * self.window:] if self._asked else []
            return None
        new, _ = self._better(self._busy)
        self._busy, self._asked = [], 0
        if new == self.budgets:
            return None
        self.budgets, self.patience = new, min(2 * self.patience, self.most_patience)
        return new

    def _better(self, busy: Sequence[Sequence[float]]) -> tuple[list[list[int]], float]:
        """Budgets by the speeds of these steps (those of now if nothing is gained), and the seconds that they save a step."""
        tokens = [sum(of_rank) for of_rank in self.budgets]
        speeds = [len(busy) * t / max(sum(b), 1e-9) for t, b in zip(tokens, zip(*busy, strict=True), strict=True)]
        new = self.deal(speeds)
        now = max(t / s for t, s in zip(tokens, speeds, strict=True))
        then = max(sum(of_rank) / s for of_rank, s in zip(new, speeds, strict=True))
        # By tokens: a step of other budgets may hold a few more or fewer.
        saved = now - then * sum(tokens) / sum(map(sum, new))
        return (new, saved) if saved > self.kind.gain * now else (self.budgets, 0.0)


def start(config: Config, ranks: Ranks, group: int, saved: dict[str, Any] | None, device: torch.device, devices: list[str],
          ) -> tuple[list[list[int]], Rebalance | None]:
    """Budgets to begin with, and what watches over them. Collective.

    Those of the checkpoint while the ranks have the devices of then: the steps are then the same, bit for bit, and compiled shapes
    stay. Else by measured speed. `group`: this rank's Engine.lockstep_group; `devices`: name of every rank's device.
    """
    on_gpu, speeds = device.type == "cuda", [1.0] * ranks.world
    groups = [of_rank[0] for of_rank in ranks.gather([group])]
    deal = partial(budgets_by_speed, config, on_gpu=on_gpu, groups=groups)
    by_speed = config.resources.balance == "speed" and ranks.world > 1
    known = saved.get("budgets") if by_speed and saved is not None and saved.get("devices") == devices else None
    if known:
        budgets = [[int(b) for b in of_rank] for of_rank in known]
    else:
        if by_speed:
            ranks.barrier()
            # In millitokens per second, as integers: every rank computes with the same numbers.
            speeds = [of_rank[0] / 1000 for of_rank in ranks.gather([max(1, round(_probe(config, device) * 1000))])]
        budgets = deal(speeds)
    if ranks.rank == 0:
        told = f" ({', '.join(f'{s:,.0f}' for s in speeds)} tokens/s of one layer)" if by_speed and not known else ""
        log.info("Tokens of each worker's micro-batches: %s%s", describe(budgets), told)
    return budgets, Rebalance(deal, budgets, GPU if on_gpu else CPU) if by_speed else None


def _probe(config: Config, device: torch.device) -> float:
    """This rank's tokens per second in one layer. A CPU takes its time, so it gets no more than a thousand tokens at once."""
    from trainer.memory import release
    from trainer.model.load import DTYPES, model_config, tokenizer_size

    run = config.run
    probe = SpeedProbe(model_config(config, tokenizer_size(config)), DTYPES[run.model.dtype], device, run.engine.compile)
    tokens = run.train.micro_batch_tokens if device.type == "cuda" else min(run.train.micro_batch_tokens, 1024)
    speed = probe.measure(tokens, min(run.data.max_tokens, 512), warm=2 if device.type == "cuda" else 1)
    del probe
    release()
    return speed


def describe(budgets: Sequence[Sequence[int]]) -> str:
    """Micro-batches times tokens of each rank, as `4x5888, 4x15360`."""
    return ", ".join(f"{len(of_rank)}x{of_rank[0]}" for of_rank in budgets)
