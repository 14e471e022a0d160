"""The thread that does the arithmetic: it advances the batches of all loaded models in turn, and sleeps when nobody asks."""

from __future__ import annotations

import logging
import threading

from chatbot.engine.base import Load
from chatbot.engine.batch import Answer, Batch
from chatbot.errors import BusyError, NotReadyError

log = logging.getLogger(__name__)


class Scheduler:
    """One thread for all models: they share the device, so two threads would only be in each other's way."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._batches: list[Batch] = []
        self._arrived: list[tuple[Batch, Answer]] = []
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def add(self, batch: Batch) -> None:
        """Serve another model."""
        with self._wake:
            self._batches.append(batch)

    def remove(self, batch: Batch) -> None:
        """Serve a model no longer; what runs on it ends with NotReadyError."""
        with self._wake:
            if batch in self._batches:
                self._batches.remove(batch)
            arrived = [a for b, a in self._arrived if b is batch]
            self._arrived = [(b, a) for b, a in self._arrived if b is not batch]
        gone = NotReadyError("The model is no longer served. Ask again.")
        for answer in arrived:
            answer.on_end(gone)
        batch.fail(gone)

    def submit(self, batch: Batch, answer: Answer) -> None:
        """Take an answer in. Raises BusyError if the line is full, NotReadyError if the model is no longer served."""
        with self._wake:
            if self._stopped or batch not in self._batches:
                raise NotReadyError("The model is no longer served. Ask again.")
            load = self._load(batch)
            if load.running + load.waiting >= batch.cache.rows + batch.limit:
                raise BusyError(f"{load.running} answers are running and {load.waiting} wait. Try again in a moment.")
            self._arrived.append((batch, answer))
            self._wake.notify()

    def cancel(self, answer: Answer) -> None:
        """Stop an answer before its next token."""
        answer.cancelled = True

    def _load(self, batch: Batch) -> Load:
        return Load(len(batch.rows), len(batch.waiting) + sum(b is batch for b, _ in self._arrived))

    def load(self, batch: Batch) -> Load:
        """Running and waiting answers of a model."""
        with self._wake:
            return self._load(batch)

    def stop(self) -> None:
        """End the thread; what runs ends with NotReadyError."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()
        for batch in list(self._batches):
            self.remove(batch)

    def _run(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """Wait for work and do one step of it; False once stopped. (A function of its own: the waiting thread holds no model.)"""
        with self._wake:
            while not self._stopped and not self._arrived and all(b.idle for b in self._batches):
                self._wake.wait()
            if self._stopped:
                return False
            for batch, answer in self._arrived:
                batch.waiting.append(answer)
            self._arrived.clear()
            busy = [b for b in self._batches if not b.idle]
        for batch in busy:
            try:
                batch.advance()
            except Exception:  # the batch has ended its answers with the error; the others go on
                log.exception("a model failed while answering")
        return True
