"""The GPU's AdamW against PyTorch's: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

SAME = """
import torch
from trainer.config import TrainConfig
from trainer.engines.optimizer import AdamW

device = "cuda" if torch.cuda.is_available() else "cpu"

def run(kernel):
    torch.manual_seed(0)
    sizes, names, shapes = [1500, 70, 1024], ["a.weight", "norm.weight", "b.weight"], [(30, 50), (70,), (32, 32)]
    masters = [torch.randn(n).to(device) for n in sizes]
    copies = [m.bfloat16() for m in masters]
    adam = AdamW(names, shapes, masters, TrainConfig(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5))
    adam._kernel = kernel
    adam._steps = [torch.zeros((), device=device) for _ in (masters[:1] if kernel else masters)]
    for step in range(6):
        gradients = [torch.randn(n).bfloat16().to(device) for n in sizes]
        norm = torch.tensor(float("nan"), device=device) if step == 3 else torch.stack([g.float().norm() for g in gradients]).norm()
        adam.step(masters, gradients, 1e-2, norm, copies)
    return masters + adam.exp_avg + adam.exp_avg_sq, copies, float(adam._steps[0])

(ours, copies, our_steps), (theirs, _, their_steps) = run(True), run(False)
assert our_steps == their_steps == 5
for a, b in zip(ours, theirs, strict=True):
    torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)
for copy, master in zip(copies, ours, strict=False):
    torch.testing.assert_close(copy.float(), master, rtol=2**-7, atol=0.0)  # the interpreter cuts where the GPU rounds
"""


def test_the_kernel_does_what_pytorchs_adamw_does():
    environment = {**os.environ, "TRITON_INTERPRET": str(int(not torch.cuda.is_available()))}
    done = subprocess.run([sys.executable, "-c", SAME], env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
