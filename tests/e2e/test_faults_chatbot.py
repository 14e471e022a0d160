"""What the chatbot survives: while it cannot answer it says so, no other model answers in its place, and it comes back by itself.

It serves a run that git names, as on a real site. All the while somebody asks which model answers, as a client would, through the node's
port. A short selection is in `make e2e`; `make chaos` (TRIES=10) does everything.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from kubernetes import client

from tests.e2e.faults import ATTEMPTS, Cluster, less_memory, record, restart_containerd, restart_kubelet, until
from tools.cluster import status
from tools.cluster.settings import Settings
from tools.layout import Layout

pytestmark = pytest.mark.timeout(900)
SELECTOR = "app.kubernetes.io/name=chatbot"
STALL = 40
"""Seconds for which the storage stands still: twice as long as the chatbot waits for it."""


@dataclass
class Client(threading.Thread):
    """Asks again and again which model answers."""

    url: str
    said: list[tuple[float, str]] = field(default_factory=list)
    """Time, and the run whose model answers; empty: no answer."""

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        while not self._over.wait(0.2):
            run = ""
            with contextlib.suppress(httpx.HTTPError, ValueError, LookupError, TypeError):
                answer = httpx.get(f"{self.url}/v1/models", timeout=3)
                run = str(answer.json()["data"][0]["attribution"]["run"]) if answer.status_code == 200 else ""
            self.said.append((time.monotonic(), run))

    def __enter__(self) -> Client:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def away(self) -> float:
        """Longest time without an answer, in seconds."""
        longest, since = 0.0, None
        for moment, run in self.said:
            if run:
                longest, since = max(longest, moment - since if since is not None else 0.0), None
            elif since is None:
                since = moment
        return longest


@dataclass
class Chatbot:
    """The local environment's chatbot."""

    cluster: Cluster
    run: str
    """Id of the run that it serves."""
    url: str

    @property
    def model(self) -> Path:
        return self.cluster.layout.storage / "runs" / self.run / "model"

    def answers(self) -> bool:
        return status.served_run(self.cluster.settings) == self.run

    def state(self) -> str:
        """What it says while it is not ready; empty if it is, or says nothing."""
        try:
            answer = httpx.get(f"{self.url}/readyz", timeout=3)
            return str(answer.json()["state"]) if answer.status_code == 503 else ""
        except (httpx.HTTPError, ValueError):
            return ""

    def pod(self) -> Any:
        return self.cluster.pods(SELECTOR)[0]

    def not_ready(self) -> bool:
        """Whether Kubernetes sends it nothing any more."""
        conditions = {c.type: c.status for c in self.pod().status.conditions}
        return conditions.get("Ready") == "False"

    def process(self) -> int:
        """Pid of the chatbot on this node."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if path.read_bytes().split(b"\0")[1:4] == [b"-m", b"chatbot", b"serve"]:
                    return int(path.parent.name)
        raise LookupError("no chatbot runs on this node")


@pytest.fixture(scope="module")
def chatbot(shared_checkout: Path, push: Any, api: client.ApiClient, layout: Layout, settings: Settings) -> Iterator[Chatbot]:
    """Pinned to the newest run of the local environment by a push; follows the newest again afterwards."""
    cluster = Cluster(api, layout, settings, change=lambda _: None)
    found = Chatbot(cluster, status.newest_run(layout), f"http://127.0.0.1:{settings.chatbot_port}")
    report = json.loads((found.model.parent / "report.json").read_text())
    path = shared_checkout / "environments/local/release.yaml"
    text = path.read_text()
    document = yaml.safe_load(text)
    document["chatbot"]["config"]["serve"] = {"run": found.run, "sha256": report["checkpoint_sha256"], "follow": "none"}

    def push_and_wait(content: str, message: str) -> None:
        """Until a pod made after the push is the only one and answers: the one before may serve the same run."""
        before = {p.metadata.uid for p in cluster.every_pod(SELECTOR)}
        path.write_text(content)
        push(shared_checkout, message)
        until(lambda: len(pods := cluster.every_pod(SELECTOR)) == 1 and pods[0].metadata.uid not in before, 240, f"another pod: {message}")
        until(lambda: status.served_run(settings) == status.newest_run(layout), 240, "the newest run's model")

    push_and_wait(yaml.safe_dump(document, sort_keys=False), "Serve one run")
    yield found
    push_and_wait(text, "Follow the newest run again")


def kill_pod(chatbot: Chatbot, chosen: random.Random) -> None:
    """A pod removed at once serves on until the kubelet and kube-proxy have heard of it, beside its successor on a busy node."""
    before = chatbot.pod().metadata.uid
    chatbot.cluster.kill_pod(SELECTOR, chosen)
    until(lambda: not chatbot.answers(), 60, "the end of its answers", every=0.1)
    until(lambda: any(p.metadata.uid != before for p in chatbot.cluster.pods(SELECTOR)), 120, "another pod")


def take_memory(chatbot: Chatbot, chosen: random.Random) -> None:
    """Its limit is lowered to what it holds, and it is asked until the kernel ends it: several long questions at once, as it may hold
    what one needs already."""
    pid = chatbot.process()

    def ask(times: int) -> None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(f"{chatbot.url}/ask", json={"question": "Does aspirin prevent heart attacks? " * times, "max_tokens": 64}, timeout=5)

    with less_memory(pid, 1 << 20), ThreadPoolExecutor(4) as people:
        def ended() -> bool:
            list(people.map(ask, (20, 50, 80, 110)))
            return not Path(f"/proc/{pid}").exists()
        until(ended, 120, "the end of the chatbot's process")


def take_model(chatbot: Chatbot, chosen: random.Random) -> None:
    """Its model's directory goes, for longer than the chatbot takes to see it."""
    away = chatbot.model.with_name("away")
    chatbot.model.rename(away)
    try:
        until(lambda: "has vanished" in chatbot.state(), 30, "the chatbot's saying so")
        until(chatbot.not_ready, 60, "the pod's not being ready")
        assert httpx.post(f"{chatbot.url}/ask", json={"question": "Why?"}, timeout=10).status_code == 503
        time.sleep(chosen.uniform(0, 5))
    except httpx.TransportError:
        pass  # the Service has nobody to send to any more: no answer at all is no wrong answer
    finally:
        away.rename(chatbot.model)


def stall(chatbot: Chatbot, chosen: random.Random) -> None:
    """Opening the model's manifest waits, as on a hard mount whose server is away; then it goes on as if nothing had been."""
    manifest = chatbot.model / "manifest.json"
    kept = manifest.rename(manifest.with_name("kept"))
    os.mkfifo(manifest)
    os.chmod(manifest, 0o644)
    try:
        until(lambda: "has not answered for" in chatbot.state(), 60, "the chatbot's saying so")
        until(chatbot.not_ready, 60, "the pod's not being ready")
        time.sleep(chosen.uniform(0, 5))
    finally:
        content, pipe = kept.read_bytes(), os.open(manifest, os.O_RDWR)
        kept.rename(manifest)
        os.write(pipe, content)
        os.close(pipe)


Fault = Callable[[Chatbot, random.Random], None]
FAULTS: dict[str, Fault] = {"pod killed": kill_pod, "out of memory": take_memory, "model directory vanished": take_model,
                            "storage stood still": stall}
QUICK = ("pod killed", "model directory vanished")


def survive(name: str, attempt: int, chatbot: Chatbot) -> None:
    chosen = random.Random(f"{name} {attempt}")
    until(chatbot.answers, 240, "the pinned model")
    with Client(chatbot.url) as asking:
        time.sleep(chosen.uniform(1, 6))
        FAULTS[name](chatbot, chosen)
        over = time.monotonic()
        until(chatbot.answers, 300, f"answers after: {name}", every=0.2)
        back = time.monotonic() - over
        time.sleep(2)
    wrong = {run for _, run in asking.said} - {"", chatbot.run}
    answer = httpx.post(f"{chatbot.url}/ask", json={"question": "Does exercise lower blood pressure?", "max_tokens": 8}, timeout=120)
    record(fault=f"chatbot: {name}", attempt=attempt, what=chatbot.run, recovery_seconds=round(back, 1),
           away_seconds=round(asking.away(), 1), wrong_answers=len(wrong))
    assert not wrong, f"other models answered: {wrong}"
    assert answer.status_code == 200 and chatbot.run in answer.text
    assert asking.away() > 0, "the fault was felt"


@pytest.mark.parametrize("name", QUICK)
def test_it_comes_back_by_itself(name: str, chatbot: Chatbot) -> None:
    survive(name, -1, chatbot)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", ATTEMPTS)
@pytest.mark.parametrize("name", FAULTS)
def test_it_comes_back_by_itself_every_time(name: str, attempt: int, chatbot: Chatbot) -> None:
    survive(name, attempt, chatbot)


def test_it_serves_on_while_the_nodes_services_restart(chatbot: Chatbot) -> None:
    until(chatbot.answers, 240, "the pinned model")
    before = {p.metadata.uid: p.status.container_statuses[0].restart_count for p in chatbot.cluster.pods("")}
    with Client(chatbot.url) as asking:
        for restart in (restart_kubelet, restart_containerd):
            restart(chatbot.cluster, random.Random(0), "")
            time.sleep(3)
    assert asking.away() < 1.0, "no question went without an answer"
    assert {p.metadata.uid: p.status.container_statuses[0].restart_count for p in chatbot.cluster.pods("")} == before
