"""What a run survives: faults at seeded random moments of real runs on the local cluster (`make chaos`, TRIES=10).

A run takes the faults of one part of the table one after the other, each a few steps after the run has got over the one before, in an
order that each try draws anew; up to five tries share a run. Every step's loss must be that of the undisturbed run, bit for bit, after
each fault and at the end; and no fault may cost more than one checkpoint interval. The model is a small random Llama (a step takes about
a second), so that what is measured is the machinery: the runs' only difference is the licence's text, which changes the hash and nothing
of the result.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from tests.e2e.faults import (
    ATTEMPTS,
    PARTS,
    Cluster,
    Fault,
    Part,
    kill_head,
    kill_training_process,
    let_in,
    out_of_memory,
    record,
    training_processes,
    until,
)
from tests.e2e.leaks import leaks
from tools.cluster import status
from tools.cluster.settings import Settings
from tools.cluster.up import OWNER
from tools.layout import REPOSITORY, Layout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS, EVERY = max(part.steps * part.together for part in PARTS), 5
"""Optimizer steps of the undisturbed run, and of any between two checkpoints."""
SMALL = {
    # A constant learning rate: the losses of a shorter run are the first ones of a longer.
    "train": {"epochs": 50, "tokens_per_step": 512, "micro_batch_tokens": 256, "schedule": "constant", "warmup_share": 0.0,
              "eval_rows": 4, "eval_every": 1000},
    "checkpoint": {"every_steps": EVERY, "keep_last": 2},
    "evaluation": {"rows": 4, "generate_rows": 1, "max_new_tokens": 4, "samples": 1}}
ARCHITECTURE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
                "vocab_size": 49152, "max_position_embeddings": 512, "tie_word_embeddings": True}
SHORT = 40
"""Steps of the runs that take one fault."""
UNDISTURBED = "undisturbed"
FOLDER = "faults"
"""Of the storage: inputs that are changed under a run."""


@dataclass
class Run:
    """A run and what is seen of it while it works."""

    label: str
    name: str
    folder: Path
    steps: int
    """Its length."""
    reached: int = 0
    """Highest step so far."""
    times: dict[int, float] = field(default_factory=dict)
    """When each step was reached first."""

    def records(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        try:
            return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        except FileNotFoundError:
            return []

    def start_of(self) -> int:
        """Which file metrics.jsonl is: training writes a new one when it goes on from a checkpoint."""
        path = self.folder / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else 0

    def look(self) -> int:
        """Take note of new steps; returns the highest so far."""
        for one in self.records():
            if one["step"] > self.reached:
                self.reached, self.times[one["step"]] = one["step"], one["time"]
        return self.reached

    def losses(self) -> dict[int, float]:
        return {one["step"]: one["loss"] for one in self.records()}


@dataclass
class World:
    """The local environment with a user's clone of its repository."""

    checkout: Path
    push: Callable[[Path, str], None]
    environment: Callable[[], status.State]
    cluster: Cluster
    storage: Path
    runs: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.finetune = self.checkout / "environments/local/finetune.yaml"
        self.original = self.finetune.read_text()

    def start(self, label: str, steps: int, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Run:
        """Push the small run under a licence of its own (`label`, with the time but for the undisturbed run, which is thus done once
        for all calls); returns when its RayJob is there."""
        document = yaml.safe_load(self.original)
        job = document["finetune-job"]
        for part, values in SMALL.items():
            job["run"].setdefault(part, {}).update(values)
        job["run"]["train"]["max_steps"] = steps
        job["run"]["model"] |= {"architecture": ARCHITECTURE, "licence": label if label == UNDISTURBED else f"{label} {time.time():.0f}"}
        change(job)
        before = self.environment().run
        self.finetune.write_text(yaml.safe_dump(document, sort_keys=False))
        self.push(self.checkout, label)
        name = until(lambda: (r := self.environment().run) and (before is None or r.name != before.name) and r.name, 180, "the new RayJob")
        self.runs.append(Run(label, str(name), self.storage / "runs" / str(name), steps))
        return self.runs[-1]

    def job(self, name: str) -> dict[str, Any]:
        return dict(self.cluster.custom.get_namespaced_custom_object(*status.RAY, self.cluster.namespace, "rayjobs", name))

    def ended(self, run: Run) -> bool:
        """Whether it has ended well. A failure fails the test."""
        run.look()
        reported = self.job(run.name).get("status", {})
        if reported.get("jobDeploymentStatus") == "Failed" or reported.get("jobStatus") == "FAILED":
            pytest.fail(f"{run.name}: {str(reported.get('message'))[-2000:]}")
        return reported.get("jobStatus") == "SUCCEEDED"

    def failed(self, name: str, seconds: float) -> str:
        """Wait until a RayJob has failed; returns what it says."""
        def over() -> str:
            reported = self.job(name).get("status", {})
            assert reported.get("jobStatus") != "SUCCEEDED"
            return str(reported.get("message", "")) if reported.get("jobStatus") == "FAILED" else ""
        return str(until(over, seconds, f"the failure of {name}", every=2))

    def attempts(self) -> int:
        """RayJobs of this environment."""
        return len(self.cluster.custom.list_namespaced_custom_object(*status.RAY, self.cluster.namespace, "rayjobs")["items"])

    def leave(self) -> None:
        """Ask for the run of before again, and then remove RayJobs and directories of all but the undisturbed run: what git still asks
        for would come back."""
        self.finetune.write_text(self.original)
        self.push(self.checkout, "The run of before")
        until(lambda: (r := self.environment().run) and r.name not in [run.name for run in self.runs], 180, "the run of before")
        for run in self.runs:
            if run.label == UNDISTURBED:  # kept, but no chatbot shall follow it
                os.utime(run.folder / "report.json", (0, 0))
                continue
            self.cluster.custom.delete_namespaced_custom_object(*status.RAY, self.cluster.namespace, "rayjobs", run.name)
            shutil.rmtree(run.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def world(shared_checkout: Path, push: Any, environment: Any, api: client.ApiClient, layout: Layout, settings: Settings) -> Iterator[World]:
    def change(name: str) -> None:
        let_in(shared_checkout, name)
        push(shared_checkout, f"Let {name} reach the chatbot")
    found = World(shared_checkout, push, environment, Cluster(api, layout, settings, change), layout.storage)
    yield found
    if found.runs:
        found.leave()


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Run:
    """The run that all others are compared with."""
    run = world.start(UNDISTURBED, STEPS)
    until(lambda: world.ended(run), 900, "the undisturbed run", every=1)
    assert list(run.losses()) == list(range(1, STEPS + 1))
    return run


def same(run: Run, undisturbed: Run) -> bool:
    """Whether each of the run's losses so far is the undisturbed run's, bit for bit."""
    whole = undisturbed.losses()
    return all(whole[step] == loss for step, loss in run.losses().items())


def whole_and_same(run: Run, undisturbed: Run) -> bool:
    return same(run, undisturbed) and list(run.losses()) == list(range(1, run.steps + 1))


def strike(world: World, run: Run, fault: Fault, chosen: random.Random, undisturbed: Run, attempt: int) -> None:
    """One fault, and the run's way on from it."""
    moment = run.look() + chosen.randrange(2, EVERY + 3)
    until(lambda: run.look() >= moment, 300, f"step {moment}", every=0.2)
    time.sleep(chosen.uniform(0, 2))
    hit, file = run.look(), run.start_of()
    assert hit < run.steps - EVERY, f"the run is too short for {fault.name}: it has reached step {hit}"
    began = time.time()
    what = fault.do(world.cluster, chosen, run.name)
    over = time.time() - began
    if fault.restarts:
        until(lambda: run.look() and run.start_of() != file, 600, f"training again after {fault.name}", every=0.2)
        before = run.reached
        until(lambda: run.look() > before, 300, f"the step after {before}", every=0.2)
        first = min((r["step"] for r in run.records() if r["time"] > run.times[before]), default=before + 1)
        repeated = max(0, before - first + 1)
    else:
        repeated = 0
        target = run.look() + 2
        until(lambda: run.look() >= min(target, run.steps), 300, f"step {target}", every=0.2)
        assert run.start_of() == file, f"{fault.name}: training was started again"
    seen = sorted(step for step in run.times if step >= hit)
    pause = max(run.times[later] - run.times[step] for step, later in itertools.pairwise(seen))
    equal = same(run, undisturbed)
    record(fault=fault.name, attempt=attempt, what=what, after_step=hit, recovery_seconds=round(pause, 1), fault_seconds=round(over, 1),
           repeated_steps=repeated, loss_equal=equal, run=run.name)
    assert equal, f"other losses after {fault.name}"
    assert repeated <= EVERY + 1, "at most one checkpoint interval, and the step under way, is done again"


RUNS = [(part, ATTEMPTS[first:first + part.together]) for part in PARTS for first in range(0, len(ATTEMPTS), part.together)]
"""Parts, and the tries that one run takes."""


@pytest.mark.parametrize(("part", "tries"), RUNS, ids=[f"{part.name} {' '.join(map(str, tries))}" for part, tries in RUNS])
def test_a_run_survives(part: Part, tries: range, world: World, undisturbed: Run) -> None:
    run = world.start(f"{part.name} {tries[0]}", part.steps * len(tries))
    jobs = world.attempts()
    for attempt in tries:
        chosen = random.Random(f"{part.name} {attempt}")
        for fault in chosen.sample(part.faults, len(part.faults)):
            strike(world, run, fault, chosen, undisturbed, attempt)
    until(lambda: world.ended(run), 900, "the end of the run", every=1)
    assert whole_and_same(run, undisturbed), "the same losses as undisturbed"
    assert world.attempts() == jobs, "no second run was started"


def test_a_run_that_lacks_memory_ends_with_the_reason(world: World, undisturbed: Run) -> None:
    """Each attempt is killed for want of memory: a few are made, then the run fails and says what is short of what."""
    began = time.time()
    run = world.start("too little memory", SHORT, lambda job: job["resources"].update(max_failures=2))
    until(lambda: run.look() >= EVERY + 1, 300, "a checkpoint", every=0.2)
    with out_of_memory(training_processes()[0]) as lower:
        lower(0.7)  # too little for any that is started in the same pod
        text = world.failed(run.name, 400)
    record(fault="out of memory for good", attempt=0, what=run.name, recovery_seconds=round(time.time() - began, 1), text=text[-1500:])
    assert "Giving up" in text
    reason = text.partition("Error: training failed and was given up: ")[2].partition("\n")[0]
    assert "was killed because its pod ran out of memory" in reason and "trainer plan` a worker holds" in reason
    assert text.count("Starting again from the last checkpoint") <= 3


def test_a_second_run_of_one_hash_is_refused(world: World, undisturbed: Run) -> None:
    run = world.start("twice", SHORT)
    until(lambda: run.look() >= 2, 300, "step 2", every=0.2)
    first = world.job(run.name)
    second = {"apiVersion": first["apiVersion"], "kind": "RayJob", "metadata": {"name": "the-same-again"},
              "spec": {k: v for k, v in copy.deepcopy(first["spec"]).items() if k != "jobId"}}
    namespace = world.cluster.namespace
    world.cluster.custom.create_namespaced_custom_object(*status.RAY, namespace, "rayjobs", second)
    try:
        text = world.failed("the-same-again", 300)
    finally:
        world.cluster.custom.delete_namespaced_custom_object(*status.RAY, namespace, "rayjobs", "the-same-again")
    assert f"Run {run.name} is being worked on by" in text
    holder = text.partition("is being worked on by")[2][:120]
    until(lambda: world.ended(run), 900, "the end of the first", every=1)
    record(fault="two runs with one hash at once", attempt=0, what=holder.strip(), recovery_seconds=0.0, repeated_steps=0,
           loss_equal=same(run, undisturbed))
    assert whole_and_same(run, undisturbed)


@pytest.fixture
def inputs(world: World, undisturbed: Run) -> Iterator[Path]:
    """A dataset and a base model (what the undisturbed run has exported) in a folder of the storage, with a run that trains on them."""
    folder = world.storage / FOLDER
    shutil.copytree(undisturbed.folder / "model", folder / "base", dirs_exist_ok=True)
    shutil.copy(REPOSITORY / "trainer/data/sample/pubmedqa-sample.jsonl", folder / "rows.jsonl")
    for path in (folder, *folder.rglob("*")):
        os.chown(path, OWNER, OWNER)
    yield folder
    shutil.rmtree(folder)


def changed_file(path: Path) -> None:
    """Other content of the same size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("name", "file", "fault"), [("dataset changed under a run", "rows.jsonl", kill_head),
                                                     ("base model changed under a run", "base/config.json", kill_training_process)])
def test_changed_inputs_are_refused(name: str, file: str, fault: Any, world: World, inputs: Path) -> None:
    """They are looked at whenever training starts again."""
    def use(job: dict[str, Any]) -> None:
        job["run"]["data"] |= {"path": f"{FOLDER}/rows.jsonl"}
        job["run"]["data"].pop("sample")
        job["run"]["model"] = {"path": f"{FOLDER}/base", "dtype": "float32", "licence": job["run"]["model"]["licence"]}
    run = world.start(name, SHORT, use)
    until(lambda: run.look() >= 2, 300, "step 2", every=0.2)
    changed_file(inputs / file)
    began = time.time()
    fault(world.cluster, random.Random(name), run.name)
    text = world.failed(run.name, 400)
    record(fault=name, attempt=0, what=file, recovery_seconds=round(time.time() - began, 1), text=text[-600:])
    assert Path(file).name in text and "Error:" in text


@pytest.fixture
def canary(world: World) -> Iterator[str]:
    """A token that all Ray pods get as HF_TOKEN from a Secret, as a site's would."""
    secret, cluster = f"hf_CANARY{random.SystemRandom().randbytes(16).hex()}", world.cluster
    path = world.checkout / "environments/local/site.yaml"
    text = path.read_text()
    document = yaml.safe_load(text)
    document["ray-cluster"]["secretEnv"] = [{"name": "HF_TOKEN", "secretName": "canary", "key": "token"}]
    cluster.core.create_namespaced_secret(cluster.namespace, {"metadata": {"name": "canary"}, "stringData": {"token": secret}})

    def have_it(wanted: bool) -> bool:
        """Whether a head and two workers, and no others, run with (or without) the token."""
        pods = cluster.core.list_namespaced_pod(cluster.namespace, label_selector="ray.io/is-ray-node=yes").items
        named = [any(e.name == "HF_TOKEN" for e in p.spec.containers[0].env) for p in pods]
        ready = all(c.ready for p in pods for c in p.status.container_statuses or [])
        return named == [wanted] * 3 and ready

    path.write_text(yaml.safe_dump(document, sort_keys=False))
    world.push(world.checkout, "A token for the hub")
    try:
        until(lambda: have_it(True), 300, "Ray pods with the token", every=2)
        yield secret
    finally:
        path.write_text(text)
        world.push(world.checkout, "No token for the hub")
        until(lambda: have_it(False), 300, "Ray pods without the token", every=2)
        cluster.core.delete_namespaced_secret("canary", cluster.namespace)


def test_a_canary_token_is_found_nowhere(world: World, canary: str, layout: Layout) -> None:
    """After a whole run with it: not in objects, logs, Ray's session logs, the run's directory, or arguments."""
    run = world.start("canary", SHORT)
    until(lambda: run.look() >= 2, 300, "step 2", every=0.2)
    assert all(canary.encode() in Path(f"/proc/{pid}/environ").read_bytes() for pid in training_processes()), "the workers have it"
    found = leaks(canary, layout, [run.folder])
    until(lambda: world.ended(run), 600, "the end of the run", every=1)
    assert found + leaks(canary, layout, [run.folder]) == []
