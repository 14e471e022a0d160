"""The training loop: the same for every engine, method and world size.

Per step the ranks exchange one short vector on the CPU: the loss of the step before (whose value has then arrived from the GPU without
a wait), whether one of them was asked to end, and whether a save is under way. So all ranks decide the same at the same step, and
nothing in a step waits for the device. Every few steps they also exchange how long each computed: from that come new budgets, which
take effect between two steps, and the report's table of the workers.

Random numbers (dropout) are drawn from a generator that is seeded anew at each step from the run's seed, the step and the rank. They
are thereby restored with the step: the same world size continues with the same bits.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trainer.checkpoint.saver import Checkpointer
from trainer.config import Config
from trainer.data.loader import Loader, PackedBatch, Step
from trainer.data.packing import Budgets, StepPlanner
from trainer.data.shards import TokenShards
from trainer.engines.base import Engine
from trainer.errors import UserError
from trainer.train.balance import Rebalance, describe
from trainer.train.busy import BusyTime, Spans
from trainer.train.metrics import Recorder, flops_per_token
from trainer.train.ranks import Ranks
from trainer.train.schedule import learning_rate
from trainer.train.stop import Preempted

log = logging.getLogger(__name__)

TELL_EVERY = 5
"""Steps between two exchanges of what each rank did."""
SETTLE = {"cuda": 2, "cpu": 0}
"""First steps of new budgets that are not counted: their shapes are compiled."""


@dataclass
class LoopState:
    """What the loop itself remembers across restarts; stored in a checkpoint's state.json."""

    total_steps: int
    """Length of the learning rate schedule."""
    best_eval: float | None = None
    bad_evals: int = 0
    """Evaluations since the best one."""
    tokens: int = 0
    """Tokens trained on so far, all ranks."""
    rows: int = 0
    seconds: float = 0.0
    """Time spent in steps so far, without evaluations."""
    finished: str = ""
    """Why training is over; empty while it is not."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """loss, eval_loss, perplexity and epoch at the step of the checkpoint."""


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every generator (torch on all devices, numpy, random) for one step of one rank."""
    mixed = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed & 0xFFFFFFFF)
    random.seed(mixed)


class Clock:
    """Seconds by phase: by events on a GPU (read when they have passed), by the wall on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._marks: list[tuple[str, Any]] = [("", self._now())]
        self.extra: dict[str, float] = {}

    def _now(self) -> Any:
        if self._device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def mark(self, phase: str) -> None:
        """The phase ends here."""
        self._marks.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase; on a GPU all marks must have passed."""
        out = dict(self.extra)
        for (_, begin), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            spent = begin.elapsed_time(end) / 1e3 if self._device is not None else end - begin
            out[phase] = out.get(phase, 0.0) + spent
        return {phase: round(s, 6) for phase, s in out.items()}


class Pending:
    """A step whose loss and gradient norm are on their way from the device."""

    def __init__(self, step: int, data: Step, lr: float, loss: torch.Tensor, norm: torch.Tensor, clock: Clock, spans: Spans | None) -> None:
        """`spans`: what this rank's computing took; None if the step does not count."""
        self.step, self.rows, self.tokens, self.loss_tokens, self.epoch = step, data.rows, data.tokens, data.loss_tokens, data.epoch
        self.lr, self.clock, self.spans = lr, clock, spans
        self.own_tokens = sum(batch.tokens for batch in data.batches)
        self.seconds = 0.0
        values = torch.stack([loss.detach().double().reshape(()), norm.detach().to(loss.device).double().reshape(())])
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(2, dtype=torch.float64, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.current_stream(values.device).record_event()
        else:
            self._values = values

    def values(self) -> tuple[float, float]:
        """This rank's loss sum and the global gradient norm; waits for the device to pass this step."""
        if self._event is not None:
            self._event.synchronize()
        loss, norm = self._values.tolist()
        return loss, norm


class Training:
    """One run's training on this rank. Every method is collective."""

    def __init__(self, config: Config, engine: Engine, ranks: Ranks, checkpointer: Checkpointer, shards: TokenShards,
                 held_out: Sequence[PackedBatch], budgets: Budgets, *, rebalance: Rebalance | None = None, peak: float = 0.0,
                 recorder: Recorder | None = None, report: Callable[[dict[str, Any]], None] | None = None,
                 stop: threading.Event | None = None, stored: dict[str, Any] | None = None,
                 layout: list[dict[str, Any]] | None = None) -> None:
        """`held_out`: this rank's batches of the held-out rows. `rebalance`: deals anew when the ranks' speeds ask for it (None: never).
        `peak`: FLOP/s of all ranks together (0: no MFU). `recorder`: on rank 0. `report`: called by all ranks with the metrics after
        each evaluation. `stored`: kept in every checkpoint's state.json. `layout`: device and node of the workers, told with what
        they did."""
        self.config, self.engine, self.ranks, self.checkpointer = config, engine, ranks, checkpointer
        self.shards, self.held_out, self.budgets = shards, held_out, budgets
        self.recorder, self._report = recorder, report
        self._rebalance = rebalance
        self._redeal = False
        self._work = BusyTime(engine.timed_parts, engine.device)
        self._settle = SETTLE[engine.device.type]
        self._done: list[tuple[int, int, float]] = []  # of each step since the ranks last told: own tokens, microseconds, seconds
        self._stop = stop or threading.Event()
        self._stored = stored or {}
        self._layout = layout or []
        self.planner = StepPlanner(shards.lengths, config.run.seed, config.run.train.epochs)
        self.step = 0
        self.state = LoopState(total_steps=0)
        self._data_state: dict[str, Any] = self.planner.state_dict()
        self._pending: Pending | None = None
        self._records: dict[int, dict[str, Any]] = {}
        self._save_wanted = False
        self._save_failed = ""
        self._saved_at = time.monotonic()
        self._message = ""
        model = getattr(engine.model, "config", None)
        self._flops_share = flops_per_token(model, config.run.method.kind != "full") / peak if peak and model is not None else 0.0

    def resume(self, saved: dict[str, Any] | None) -> None:
        """Go on from a checkpoint's state (`restore` has loaded the engine); from the beginning with None."""
        if saved is not None:
            self.step = int(saved["step"])
            self.planner.load_state_dict(saved["planner"])
            self._data_state = saved["planner"]
            self.state = LoopState(**saved["loop"])
        if not self.state.total_steps:
            steps = self.planner.count_steps(self.budgets)
            most = self.config.run.train.max_steps
            self.state.total_steps = min(steps, most) if most else steps

    def run(self) -> LoopState:
        """Train to the end. Raises UserError (the loss diverged, the storage is full and the run shall stop), Preempted."""
        if self.state.finished:
            return self.state
        pin = self.engine.device.type == "cuda"
        reason = ""
        while not reason:
            with Loader(self.shards, self.planner, self.budgets, self.ranks.rank, self.config.run.data.loss_on, pin=pin) as loader:
                reason = self._steps(loader)
            if not reason:  # new budgets: the loader had planned ahead with the old ones
                self.planner.load_state_dict(self._data_state)
        self._finish(reason)
        return self.state

    def _steps(self, loader: Loader) -> str:
        """Steps until training ends (returns why) or the tokens are dealt anew (returns nothing)."""
        began = time.perf_counter()
        for data in loader:
            self._one(data, time.perf_counter() - began)
            if reason := self._after(data):
                return reason
            if self._redeal:
                self._redeal = False
                return ""
            began = time.perf_counter()
        return "all epochs are done"

    def _one(self, data: Step, waited: float) -> None:
        """One optimizer step, and the values of the one before."""
        train = self.config.run.train
        began = time.perf_counter()
        self.step += 1
        seed_step(self.config.run.seed, self.step, self.ranks.rank)
        rate = learning_rate(self.step, self.state.total_steps, train)
        clock = Clock(self.engine.device)
        clock.extra["data"] = waited
        loss = self.engine.forward_backward(data.batches, max(1, data.loss_tokens))
        clock.mark("forward_backward")
        self.checkpointer.before_update()
        clock.mark("checkpoint")
        norm = self.engine.step(rate)
        clock.mark("optimizer")
        spans, counts = self._work.cut(), self._settle == 0
        self._settle = max(0, self._settle - 1)
        previous, self._pending = self._pending, Pending(self.step, data, rate, loss, norm, clock, spans if counts else None)
        self._data_state = data.state
        self.state.tokens += data.tokens
        self.state.rows += data.rows
        checkpoint = self.config.run.checkpoint
        overdue = time.monotonic() - self._saved_at >= checkpoint.every_minutes * 60
        values = previous.values() if previous is not None else (0.0, 0.0)
        total_loss, self._stopping, busy, due, failed = self.ranks.sum(
            [values[0], float(self._stop.is_set()), float(self.checkpointer.busy), float(overdue and self.ranks.rank == 0),
             float(bool(self._save_failed) and checkpoint.on_full_disk == "stop")])
        self._busy = busy > 0
        self._save_wanted |= due > 0 or (bool(checkpoint.every_steps) and self.step % checkpoint.every_steps == 0)
        self._pending.seconds = time.perf_counter() - began + waited
        self.state.seconds += self._pending.seconds
        if previous is not None:
            self._emit(previous, total_loss, values[1])
        if failed:
            raise UserError(f"The state could not be saved: {self._save_failed or 'see the other workers'}. Make room on the storage and "
                            "start the run again: it goes on from its last checkpoint (run.checkpoint.on_full_disk: stop).")

    def _after(self, data: Step) -> str:
        """Evaluate, save, stop: whatever is due after this step. Returns why training ends, or nothing."""
        train = self.config.run.train
        if self._ends(data):  # `_finish` evaluates and saves; also when asked to end, because that is all that is left
            return ""
        last = self.step >= self.state.total_steps and bool(train.max_steps)
        rows = len(self.shards)
        crossed = math.floor((data.epoch * rows + 0.5) / rows) > math.floor(((data.epoch * rows) - data.rows + 0.5) / rows)
        reason = "the configured steps are done" if last else ""
        if not last and (self.step % train.eval_every == 0 if train.eval_every else crossed):
            reason = self._evaluate()
        self._outcomes()
        if self._stopping and not reason:
            self._preempted()
        if self._save_wanted and not self._busy and not reason:
            self._save()
        return reason

    def _ends(self, data: Step) -> bool:
        """Whether this was the last step of the data."""
        return round(data.epoch * len(self.shards)) >= self.planner.total

    def _emit(self, step: Pending, loss_sum: float, norm: float, tell: bool = False) -> None:
        """Record a step whose values have arrived. `tell`: with what the workers did since they last told."""
        loss = loss_sum / max(1, step.loss_tokens)
        if not math.isfinite(loss):
            raise UserError(f"The loss of step {step.step} is not a number. Lower run.train.learning_rate (now "
                            f"{self.config.run.train.learning_rate:g}) or raise run.train.warmup_share; the last checkpoint is from "
                            "before.")
        per_second = 1 / step.seconds if step.seconds > 0 else 0.0
        speed = step.tokens * per_second
        record: dict[str, Any] = {
            "step": step.step, "epoch": round(step.epoch, 6), "loss": loss, "lr": step.lr, "grad_norm": norm, "tokens": step.tokens,
            "rows": step.rows, "tokens_per_second": round(speed, 3), "samples_per_second": round(step.rows * per_second, 3),
            "mfu": round(speed * self._flops_share, 5) if self._flops_share else None, "seconds": step.clock.seconds(), "time": time.time()}
        record.update(self._records.pop(step.step, {}))
        record.update(self._workers(step, tell))
        self.state.metrics = {**self.state.metrics, "loss": loss, "epoch": record["epoch"]}
        if self.recorder is None:
            return
        self.recorder.record(record)
        per_step = self.state.seconds / max(1, self.step)
        left = max(0, self.state.total_steps - step.step)
        self.recorder.report_progress(100.0 * step.step / max(1, self.state.total_steps), self._message, step=step.step,
                                      steps=self.state.total_steps, tokens_per_second=round(speed, 1),
                                      eta_seconds=round(left * per_step, 1), loss=loss)

    def _workers(self, step: Pending, tell: bool) -> dict[str, Any]:
        """What each worker did in the last steps, once there are enough of them (or `tell`): computing, and waiting for the slowest.
        From the same numbers come new budgets. Collective when it is time."""
        if step.spans is not None:
            self._done.append((step.own_tokens, round(self._work.seconds(step.spans) * 1e6), step.seconds))
        if not self._done or not (tell or len(self._done) >= TELL_EVERY):
            return {}
        done, self._done = self._done, []
        told = self.ranks.gather([value for tokens, micros, _ in done for value in (tokens, micros)])
        busy = [[micros / 1e6 for micros in of_rank[1::2]] for of_rank in told]
        by_step = list(zip(*busy, strict=True))
        slowest = sum(map(max, by_step))
        workers = [{"micro_batches": len(budget), "micro_batch_tokens": budget[0], "tokens": sum(of_rank[0::2]),
                    "compute": round(sum(own), 6), "wait": round(slowest - sum(own), 6)}
                   for budget, of_rank, own in zip(self.budgets, told, busy, strict=True)]
        for of_step in by_step:
            new = self._rebalance.observe(of_step, self.state.total_steps - step.step) if self._rebalance is not None else None
            if new is not None:
                self._deal(step.step, new)
                break  # the steps that are left were done with the old budgets
        return {"workers": {"steps": len(done), "seconds": round(sum(seconds for *_, seconds in done), 6), "ranks": workers,
                            **({"layout": self._layout} if self._layout else {})}}

    def _deal(self, step: int, budgets: list[list[int]]) -> None:
        """New budgets for the steps after the one that is under way."""
        log.info("Step %d: the workers' speeds ask for other budgets. Tokens of their micro-batches: %s; before: %s", step,
                 describe(budgets), describe(self.budgets))
        self.budgets, self._redeal, self._settle = budgets, True, SETTLE[self.engine.device.type]
        if self._pending is not None:
            self._pending.spans = None

    def _flush(self) -> None:
        """Wait for the newest step's values and record them."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            loss, norm = pending.values()
            self._emit(pending, self.ranks.sum([loss])[0], norm, tell=True)

    def _evaluate(self) -> str:
        """Held-out loss; returns why training ends, or nothing."""
        train = self.config.run.train
        if self.state.metrics.get("eval_step") == self.step:  # just done, or done before the end was interrupted
            return ""
        loss_sum, tokens = self.engine.evaluate(self.held_out)
        total, count = self.ranks.sum([float(loss_sum), float(tokens)])
        if not count:
            return ""
        loss = total / count
        perplexity = math.exp(min(loss, 700.0))
        if self._pending is not None:
            self._records[self._pending.step] = {"eval_loss": loss, "perplexity": perplexity}
        self._flush()
        state = self.state
        state.metrics = {**state.metrics, "eval_loss": loss, "perplexity": perplexity, "eval_step": self.step}
        log.info("Step %d: held-out loss %.4f, perplexity %.3f", self.step, loss, perplexity)
        if self._report is not None:
            self._report({"step": self.step, **{k: v for k, v in state.metrics.items() if k != "eval_step"}})
        if state.best_eval is None or loss < state.best_eval:
            state.best_eval, state.bad_evals = loss, 0
            if self.config.run.checkpoint.keep_best:  # at this step and no later one, whose held-out loss is not known
                self.checkpointer.wait()
                self._save_wanted, self._busy = True, False
        else:
            state.bad_evals += 1
        if train.stop_perplexity and perplexity <= train.stop_perplexity:
            return f"the held-out perplexity {perplexity:.3f} is at or below {train.stop_perplexity}"
        if train.early_stopping and state.bad_evals >= train.early_stopping:
            return f"the held-out loss has not improved for {state.bad_evals} evaluations"
        return ""

    def _save(self, hold: bool = False) -> None:
        self._flush()  # also refuses to save a state whose loss is not a number
        self._save_wanted, self._saved_at = False, time.monotonic()
        metrics = dict(self.state.metrics)
        if metrics.pop("eval_step", None) != self.step:  # the held-out loss of an older step does not describe this checkpoint
            metrics.pop("eval_loss", None)
            metrics.pop("perplexity", None)
        state = {"planner": self._data_state, "loop": vars(self.state).copy(), "metrics": metrics,
                 "budgets": [list(of_rank) for of_rank in self.budgets], **self._stored}
        self.checkpointer.save(self.step, state, hold)

    def _outcomes(self) -> None:
        for outcome in self.checkpointer.outcomes():
            if outcome.saved:
                self._save_failed, self._message = "", ""
                log.info("Checkpoint of step %d: %.2f GB of this rank in %.1f s", outcome.step, outcome.bytes / 1e9, outcome.seconds)
            else:
                self._save_failed = f"step {outcome.step}: {outcome.message}"
                self._message = f"the checkpoint of step {outcome.step} was not saved: {outcome.message}"
                log.warning("The checkpoint of step %d was not saved: %s. The older checkpoints stay.", outcome.step, outcome.message)

    def _preempted(self) -> None:
        self.checkpointer.wait()
        self._save(hold=True)
        self.checkpointer.wait()
        outcome = self.checkpointer.outcomes()[-1]
        how = "its state is saved" if outcome.saved else f"not saved: {outcome.message}"
        raise Preempted(f"Asked to end at step {self.step}; {how}.")

    def _finish(self, reason: str, tries: int = 4, wait_s: float = 15.0) -> None:
        """Evaluate and save the end. Without this checkpoint nothing can be exported, so a full storage is waited for a while."""
        self._evaluate()
        self._flush()
        self.state.finished = reason
        for attempt in range(tries):
            self.checkpointer.wait()
            self._outcomes()
            self._save(hold=True)
            self.checkpointer.wait()
            self._outcomes()
            if not self._save_failed:
                break
            if attempt + 1 < tries and self.config.run.checkpoint.on_full_disk == "continue":
                log.warning("The final state could not be saved; trying again in %.0f s.", wait_s)
                time.sleep(wait_s)
        if self._save_failed:
            raise UserError(f"The final state could not be saved ({self._save_failed}). Make room on the storage and start the run again: "
                            "it goes on from its last checkpoint.")
        log.info("Training ended after step %d: %s", self.step, reason)
        if self.recorder is not None:
            self.recorder.report_progress(100.0, reason, now=True, step=self.step, steps=self.step, loss=self.state.metrics.get("loss"))
