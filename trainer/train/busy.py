"""How long a rank computes in a step, without the time in which it waits for the others.

Where weights are sharded, forward and backward of every layer wait for the slowest rank's part, so a step takes the same time on all
ranks and says nothing of any one. Timed here are the parts themselves (decoder layers and head), inside of whatever gathers their
weights before and reduces their gradients after. On a GPU that is done by events, read after they have passed: nothing waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

Spans = list[tuple[Any, Any]]
"""Begins and ends: seconds on a CPU, events on a GPU."""


class BusyTime:
    """Times the training passes of some modules. Their `forward` is replaced on the instances, so make one after the engine."""

    def __init__(self, parts: Sequence[nn.Module], device: torch.device) -> None:
        """`parts`: modules whose first positional argument is the tensor that they work on, and which return a tensor."""
        self._device = device if device.type == "cuda" else None
        self._spans: Spans = []
        self._spare: list[torch.cuda.Event] = []
        for part in parts:
            part.forward = self._timed(part.forward)  # type: ignore[method-assign]

    def cut(self) -> Spans:
        """What was timed since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def seconds(self, spans: Spans) -> float:
        """Their sum; on a GPU they must have passed. To be called once: the events are used again."""
        if self._device is None:
            return sum(end - begin for begin, end in spans)
        total = sum(begin.elapsed_time(end) for begin, end in spans) / 1e3
        self._spare += [event for span in spans for event in span]
        return total

    def _now(self) -> Any:
        if self._device is None:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(hidden, *args, **kwargs)
            begin = self._now()
            out = forward(hidden, *args, **kwargs)
            self._spans.append((begin, self._now()))
            if out.grad_fn is not None and hidden.requires_grad:
                begins: list[Any] = []
                # A node's own hook runs after the hooks of its output, in which FSDP gathers the weights; the input's hook runs before
                # the node in which it reduces the gradients.
                out.grad_fn.register_prehook(lambda _: begins.append(self._now()))
                hidden.register_hook(lambda _: self._spans.append((begins.pop(), self._now())))
            return out

        return timed
