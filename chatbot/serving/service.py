"""Which model answers now: loads it, watches the storage, moves to a newer run without breaking running answers.

Readiness means: a question asked now gets an answer. It goes when the served model's files vanish from the storage or the storage does
not answer (they are mapped into memory, so a page that is not in memory any more could not be read), or when the endpoint that generates
the answers does not answer; and comes back with them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from chatbot.config import Config
from chatbot.engine.base import Model
from chatbot.engine.loading import give_back, load_tokenizer, set_threads
from chatbot.engine.local import LocalModel
from chatbot.engine.remote import RemoteModel
from chatbot.engine.scheduler import Scheduler
from chatbot.errors import NotReadyError, UserError
from chatbot.serving import facts as facts_of
from chatbot.serving import manifest as manifests
from chatbot.serving import prompt as prompts
from chatbot.serving.facts import Facts
from chatbot.serving.prompt import PromptFormat
from chatbot.serving.runs import Run, base_of, resolve

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_S = 20.0
"""Seconds after which a storage that has not answered a look is said to stand still. A busy NFS server takes a few."""


@dataclass(eq=False)
class Served:
    """A loaded run."""

    run: Run
    facts: Facts
    prompt: PromptFormat
    tokenizer: Any
    tuned: Model
    base: Model | None
    users: int = 0
    """Answers that are using it."""
    retired: bool = False
    unused: asyncio.Event = field(default_factory=asyncio.Event)

    def model(self, name: str) -> Model:
        """`tuned` or `base`. Raises UserError if the base model is not loaded."""
        if name == "base":
            if self.base is None:
                raise UserError("The base model is not loaded. Set serve.base: true.")
            return self.base
        return self.tuned


class Service:
    """Holds the served run. All methods belong to one event loop; loading happens in a thread."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.current: Served | None = None
        self.state = "starting"
        """What is going on, for people: on /readyz and on the page while nothing can be asked."""
        self.present = True
        self.trouble = ""
        """With `engine.kind: openai`: why the endpoint does not answer."""
        self.stopping = False
        self._scheduler = Scheduler() if config.engine.kind == "transformers" else None
        self._refused: tuple[str, str] | None = None
        self._asked: float | None = None
        """When the storage was asked what it has not answered yet."""
        self._watcher: asyncio.Task[None] | None = None
        self._retiring: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to load and to watch; returns at once."""
        if self.config.engine.kind == "transformers":
            set_threads(self.config.engine.threads)
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Free everything."""
        self.stopping = True
        if self._watcher:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self.current:
            await self._close(self.current)
        for task in self._retiring:
            task.cancel()
        if self._scheduler:
            await asyncio.to_thread(self._scheduler.stop)

    async def drain(self, seconds: float) -> None:
        """Take no new questions, and wait until the running answers have ended, at most so long."""
        self.stopping = True
        until = time.monotonic() + seconds
        while self.current and self.current.users and time.monotonic() < until:
            await asyncio.sleep(0.05)

    def ready(self) -> tuple[bool, str]:
        """Whether a question asked now gets an answer, and the reason if not."""
        if self.stopping:
            return False, "shutting down"
        if self.current is None:
            return False, self.state
        if not self.present:
            return False, f"the model of {self.current.run.id} has vanished from {self.current.run.model}"
        if self._asked is not None and (since := time.monotonic() - self._asked) > PATIENCE_S:
            return False, f"the storage has not answered for {since:.0f} s"
        if self.trouble:
            return False, self.trouble
        return True, f"serving {self.current.run.id}"

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Served]:
        """The served run, kept loaded until the block is left. Raises NotReadyError."""
        ok, reason = self.ready()
        if not ok or self.current is None:
            raise NotReadyError(f"No answer now: {reason}.")
        served = self.current
        served.users += 1
        try:
            yield served
        finally:
            served.users -= 1
            if served.retired and not served.users:
                served.unused.set()

    async def _watch(self) -> None:
        """Look at the storage again and again: is the served model there, is there a newer run?"""
        while True:
            try:
                await self._look()
            except Exception:  # the watcher must outlive a storage that misbehaves
                log.exception("looking at the storage failed")
            await asyncio.sleep(self.config.serve.every_seconds)

    async def _look(self) -> None:
        if self.current:
            present = await self._ask(self.current.run.present)
            if present != self.present:
                log.log(logging.INFO if present else logging.ERROR, "the model of %s %s", self.current.run.id,
                        "is there again" if present else "has vanished from the storage")
                self.present = present
            self._note(await self._trouble(self.current))
            if self.config.serve.follow == "none":
                return
        try:
            run = await self._ask(lambda: resolve(self.config.storage_path, self.config.serve))
        except UserError as error:
            if self.current is None and self.state != str(error):
                log.warning("%s", error)
                self.state = str(error)
            return
        if self.current and self.current.run.digest == run.digest and self.current.run.id == run.id:
            return
        if self._refused == (run.id, run.digest):
            return
        await self._move(run)

    async def _ask(self, question: Callable[[], T]) -> T:
        """Ask the storage, in a thread: it may stand still."""
        self._asked = time.monotonic()
        try:
            return await asyncio.to_thread(question)
        finally:
            self._asked = None

    async def _trouble(self, served: Served) -> str:
        """Why the endpoint of a remote engine does not answer; empty if it does, or the engine is in this process."""
        for model in (served.tuned, served.base):
            if isinstance(model, RemoteModel) and (trouble := await model.problem()):
                return trouble
        return ""

    def _note(self, trouble: str) -> None:
        if trouble != self.trouble:
            log.log(logging.ERROR if trouble else logging.INFO, "%s", trouble or "the endpoint answers")
            self.trouble = trouble

    async def _move(self, run: Run) -> None:
        """Load a run, then let it answer; what is running goes on with the old one."""
        log.info("loading %s (%s)", run.id, run.digest)
        try:
            served = await asyncio.to_thread(self._load, run)
        except UserError as error:
            log.error("%s cannot be served: %s", run.id, error)
            self._refused = (run.id, run.digest)
            if self.current is None:
                self.state = str(error)
            return
        self._note(await self._trouble(served))
        old, self.current, self.present = self.current, served, True
        log.info("serving %s", run.id)
        if old:
            old.retired = True
            if not old.users:
                old.unused.set()
            task = asyncio.create_task(self._close_when_unused(old))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    def _load(self, run: Run) -> Served:
        """Verify and load; in a thread."""
        serve, engine = self.config.serve, self.config.engine
        if serve.verify:
            began = time.monotonic()

            def progress(at: manifests.Progress) -> None:
                self._say(f"checking {run.id}: {at.done / 1e9:.1f} of {at.total / 1e9:.1f} GB")

            manifests.verify(run.model, run.manifest, progress)
            log.info("checked %s in %.1f s", run.id, time.monotonic() - began)
        self._say(f"loading {run.id}")
        prompt, facts = prompts.load(run.model), facts_of.gather(run.root, run.digest)
        base: Model | None = None
        tuned: Model
        if self._scheduler is None:
            tuned = RemoteModel(engine, engine.model)
            base = RemoteModel(engine, engine.base_model) if serve.base else None
            return Served(run, facts, prompt, load_tokenizer(run.model), tuned, base)
        local = LocalModel.load_directory(run.model, self._scheduler, engine)
        if serve.base:
            self._say(f"loading the base model of {run.id}")
            try:
                place = base_of(run, self.config.storage_path, serve)
                base = LocalModel.load_directory(place.directory, self._scheduler, engine, place.gguf_file)
            except UserError:
                self._scheduler.remove(local.batch)
                raise
        return Served(run, facts, prompt, local.tokenizer, local, base)

    def _say(self, text: str) -> None:
        self.state = text

    async def _close_when_unused(self, served: Served) -> None:
        await served.unused.wait()
        await self._close(served)
        log.info("let go of %s", served.run.id)
        del served
        await asyncio.to_thread(give_back)

    async def _close(self, served: Served) -> None:
        for model in (served.tuned, served.base):
            if model:
                await model.close()
