"""Long steps with their elapsed and expected time, run one after another or several at once."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(frozen=True)
class Step:
    """One piece of work. `work(say)` does it; `say(text)` shows what it is at. It must be safe to repeat."""

    name: str
    """Shown to the user, and the key under which its duration is remembered."""
    work: Callable[[Callable[[str], None]], object]
    """Returns False if there was nothing to do."""
    expected: float
    """Seconds that it takes the first time, on two cores."""
    after: tuple[str, ...] = ()
    """Names of the steps that must have ended."""


@dataclass
class Runner:
    """Runs steps, several at once where their order allows, and shows them.

    On a terminal the running steps are one line that is rewritten; otherwise a line is printed at each start, end and half minute.
    """

    timings: Path
    """JSON file of durations seen on this machine: the expected times of the next run."""
    interval: float = 30.0
    _said: dict[str, str] = field(default_factory=dict)
    _seen: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.timings.exists():
            self._seen = json.loads(self.timings.read_text())

    def run(self, steps: Sequence[Step], at_once: int = 2) -> None:
        """Run all steps. The first failure is raised after the steps that were under way have ended."""
        left = {s.name: s for s in steps}
        for step in steps:
            unknown = set(step.after) - {s.name for s in steps}
            assert not unknown, f"{step.name} waits for unknown steps {unknown}"
        started: dict[Future[object], tuple[Step, float]] = {}
        ended: set[str] = set()
        failure: BaseException | None = None
        begin = last_line = time.monotonic()
        terminal = sys.stdout.isatty()
        with ThreadPoolExecutor(max_workers=at_once) as pool:
            while left or started:
                for step in list(left.values()):
                    if failure is None and len(started) < at_once and ended.issuperset(step.after):
                        del left[step.name]
                        started[pool.submit(step.work, self._sayer(step.name))] = (step, time.monotonic())
                        if not terminal:
                            self._print(begin, f"{step.name} ... (about {clock(self._expected(step))})")
                if not started:
                    break
                done, _ = wait(started, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    step, since = started.pop(future)
                    took = time.monotonic() - since
                    if error := future.exception():
                        failure = failure or error
                        self._print(begin, f"{step.name}: FAILED after {clock(took)}")
                        continue
                    ended.add(step.name)
                    if future.result() is False:
                        self._print(begin, f"{step.name}: nothing to do")
                    else:
                        self._remember(step.name, took)
                        self._print(begin, f"{step.name}: done in {clock(took)}")
                now = time.monotonic()
                if started and (terminal or now - last_line >= self.interval):
                    text = "; ".join(f"{s.name} {clock(now - t)}{self._against_usual(s, now - t)}"
                                     + (f" ({self._said[s.name]})" if self._said.get(s.name) else "") for s, t in started.values())
                    if terminal:
                        print(f"\r\033[K[{clock(now - begin)}] {text}"[:200], end="", flush=True)
                    else:
                        self._print(begin, text)
                    last_line = now
        if failure:
            raise failure

    def _sayer(self, name: str) -> Callable[[str], None]:
        def say(text: str) -> None:
            self._said[name] = text
        return say

    def _expected(self, step: Step) -> float:
        return self._seen.get(step.name, step.expected)

    def _against_usual(self, step: Step, elapsed: float) -> str:
        usual = self._expected(step)
        return f" of about {clock(usual)}" if elapsed <= usual else f", usually {clock(usual)}"

    def _remember(self, name: str, seconds: float) -> None:
        with self._lock:
            self._seen[name] = round(seconds, 1)
            self.timings.parent.mkdir(parents=True, exist_ok=True)
            self.timings.write_text(json.dumps(self._seen, indent=1))

    def _print(self, begin: float, text: str) -> None:
        clear = "\r\033[K" if sys.stdout.isatty() else ""
        print(f"{clear}[{clock(time.monotonic() - begin)}] {text}", flush=True)
