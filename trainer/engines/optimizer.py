"""AdamW on float32 masters, clipped by the global norm, without the host waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from trainer.config import TrainConfig

BUCKET = 1 << 28
"""Elements updated by one call of PyTorch's AdamW (on the CPU): bounds the float32 copies of bfloat16 gradients (1 GiB)."""


def decays(name: str, shape: Sequence[int]) -> bool:
    """Whether weight decay applies to a parameter: not to norms, biases and embeddings."""
    return len(shape) > 1 and "embed_tokens" not in name


def squared_norm(gradients: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sum of squares of all elements, float32 on `device`; 0 for no gradients."""
    if not gradients:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(list(gradients), 2.0, dtype=torch.float32)).square().sum().to(device)


class AdamW:
    """State of AdamW for a list of local tensors (1-D views; this rank's parts of the masters)."""

    def __init__(self, names: Sequence[str], shapes: Sequence[Sequence[int]], masters: Sequence[torch.Tensor], train: TrainConfig) -> None:
        self.train = train
        self.exp_avg = [torch.zeros_like(m) for m in masters]
        self.exp_avg_sq = [torch.zeros_like(m) for m in masters]
        self._kernel = bool(masters) and masters[0].is_cuda
        self._steps = [torch.zeros((), dtype=torch.float32, device=m.device) for m in (masters[:1] if self._kernel else masters)]
        self._buckets: list[tuple[bool, list[int]]] = []
        for decay in (True, False):
            size = BUCKET
            for i, (name, shape, master) in enumerate(zip(names, shapes, masters, strict=True)):
                if master.numel() == 0 or decays(name, shape) != decay:
                    continue
                if size + master.numel() > BUCKET:
                    self._buckets.append((decay, []))
                    size = 0
                self._buckets[-1][1].append(i)
                size += master.numel()

    def set_step(self, step: int) -> None:
        """Say how many updates were done (bias correction), after a restore."""
        for tensor in self._steps:
            tensor.fill_(step)

    @torch.no_grad()
    def step(self, masters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], learning_rate: float, norm: torch.Tensor,
             copies: Sequence[torch.Tensor] | None = None) -> None:
        """One update. `gradients` and `copies` (the computing weights, if the masters are not used themselves) are of any type.

        With a norm that is not finite nothing is changed: the loop sees it in the metrics, a NaN never reaches the weights.
        """
        limit = self.train.max_grad_norm
        bad = (~torch.isfinite(norm)).float()
        scale = (norm / limit).clamp(min=1.0) if limit > 0 else torch.ones_like(norm)
        if self._kernel:
            self._step_kernel(masters, gradients, learning_rate, scale, bad, copies)
            return
        for decay, members in self._buckets:
            chosen = [masters[i] for i in members]
            adamw(chosen, [gradients[i].to(torch.float32) for i in members], [self.exp_avg[i] for i in members],
                  [self.exp_avg_sq[i] for i in members], [], [self._steps[i] for i in members], fused=True, grad_scale=scale,
                  found_inf=bad, amsgrad=False, beta1=self.train.beta1, beta2=self.train.beta2, lr=learning_rate,
                  weight_decay=self.train.weight_decay if decay else 0.0, eps=self.train.epsilon, maximize=False)
            if copies is not None:
                torch._foreach_copy_([copies[i] for i in members], chosen)

    def _step_kernel(self, masters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], learning_rate: float, scale: torch.Tensor,
                     bad: torch.Tensor, copies: Sequence[torch.Tensor] | None) -> None:
        """The update on the GPU: one pass over the memory. No value comes to the host."""
        from trainer.engines import adamw_kernel

        (step,) = self._steps
        step += 1.0 - bad
        exact = step.double()  # 1 - 0.999 has three digits too few in float32
        scalars = torch.stack([1.0 / scale.double(), learning_rate / (1.0 - torch.pow(self.train.beta1, exact)),
                               torch.rsqrt(1.0 - torch.pow(self.train.beta2, exact)), bad.double()]).float()
        for decay, members in self._buckets:
            kept = 1.0 - learning_rate * self.train.weight_decay if decay else 1.0
            for i in members:
                adamw_kernel.update(masters[i], self.exp_avg[i], self.exp_avg_sq[i], gradients[i], copies[i] if copies else None, scalars,
                                    self.train.beta1, self.train.beta2, self.train.epsilon, kept)


def global_norm(gradients: Sequence[torch.Tensor], device: torch.device, group: dist.ProcessGroup | None, sharded: bool) -> torch.Tensor:
    """Norm over this rank's gradients, and over those of `group` if they are `sharded` over it. On `device`, not waited for."""
    total = squared_norm(gradients, device)
    if sharded:
        dist.all_reduce(total, group=group)
    return total.sqrt()
