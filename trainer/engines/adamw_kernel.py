"""AdamW's update of one tensor in one pass over the GPU's memory.

PyTorch's fused AdamW wants gradients of the masters' type and knows no bfloat16 copies: beside its own 28 bytes an element, the casts
there and back move another 12. Here the gradient is read as it is and the copy written as it is computed: 28 bytes, gradients and copies
being bfloat16.
The update is that of torch.optim.AdamW (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _update(master, exp_avg, exp_avg_sq, gradient, copy, scalars, count, beta1, rest1, beta2, rest2, epsilon, decay,
            HAS_COPY: tl.constexpr, BLOCK: tl.constexpr):
    if tl.load(scalars + 3) != 0.0:  # the norm is not finite: nothing is changed
        return
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < count
    weight = tl.load(master + places, mask=mask)
    first = tl.load(exp_avg + places, mask=mask)
    second = tl.load(exp_avg_sq + places, mask=mask)
    grad = tl.load(gradient + places, mask=mask).to(tl.float32) * tl.load(scalars)
    first = beta1 * first + rest1 * grad
    second = beta2 * second + rest2 * grad * grad
    weight *= decay
    weight -= tl.load(scalars + 1) * first / (tl.sqrt(second) * tl.load(scalars + 2) + epsilon)
    tl.store(exp_avg + places, first, mask=mask)
    tl.store(exp_avg_sq + places, second, mask=mask)
    tl.store(master + places, weight, mask=mask)
    if HAS_COPY:
        tl.store(copy + places, weight.to(copy.dtype.element_ty), mask=mask)


def update(master: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, gradient: torch.Tensor, copy: torch.Tensor | None,
           scalars: torch.Tensor, beta1: float, beta2: float, epsilon: float, decay: float) -> None:
    """Update `master`, `exp_avg` and `exp_avg_sq` (float32, contiguous, 1-D) in place, and write `copy` (any float type) from the master.

    `scalars`: float32 [4] on the device: what the gradient is multiplied by; learning rate over the first bias correction; one over the
    root of the second; not 0 to change nothing. `decay`: what the weight is multiplied by, 1 - learning rate * weight decay.
    """
    count = master.numel()
    _update[(triton.cdiv(count, BLOCK),)](
        master, exp_avg, exp_avg_sq, gradient, master if copy is None else copy, scalars, count, beta1, 1.0 - beta1, beta2, 1.0 - beta2,
        epsilon, decay, HAS_COPY=copy is not None, BLOCK=BLOCK)
