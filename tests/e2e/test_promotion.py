"""Two environments on the local cluster, made by a push: a run goes from one to the other by its evidence, a worse one is refused, and
back again. Trains twice (two steps of one worker); `make e2e-promotion` runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from tools import environments
from tools.cluster import status
from tools.cluster.up import OWNER
from tools.remove import remove

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

DEV, STAGING = "local-dev", "local-staging"
FOLDER = "promotion"
"""Folder of the node's storage that the two share: the local environment's chatbot does not follow their runs."""
HEAL = 60
"""Seconds within which an edit or a deletion of a live object is taken back."""


@dataclass
class World:
    """The two environments, and what the tests hand each other."""

    checkout: Path
    api: client.ApiClient
    state: Callable[[str], status.State]
    storage: Path
    good: dict[str, Any] = field(default_factory=dict)
    """Report of the good run."""
    bad: dict[str, Any] = field(default_factory=dict)

    def path(self, environment: str, file: str) -> Path:
        return self.checkout / "environments" / environment / file

    def change(self, environment: str, file: str, change: Callable[[Any], None]) -> None:
        """Edit a values file."""
        path = self.path(environment, file)
        values = yaml.safe_load(path.read_text())
        change(values)
        path.write_text(yaml.safe_dump(values, sort_keys=False))

    def report(self, run: str) -> dict[str, Any]:
        return dict(json.loads((self.storage / "runs" / run / "report.json").read_text()))

    def served(self) -> tuple[str, str]:
        """Run and digest that staging's chatbot itself names; empty while it cannot answer."""
        try:
            service: Any = client.CoreV1Api(self.api).read_namespaced_service("llm-finetune-chatbot", environments.namespace(STAGING))
            answer = httpx.get(f"http://{service.spec.cluster_ip}:{service.spec.ports[0].port}/v1/models", timeout=5)
            found = answer.json()["data"][0]["attribution"]
            return found["run"], found["checkpoint_sha256"]
        except (ApiException, httpx.HTTPError, ValueError, LookupError, TypeError):
            return "", ""

    def tool(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`python -m tools ...` of the user's clone, as make calls it."""
        env = {**os.environ, "PYTHONPATH": str(self.checkout), "GIT_TERMINAL_PROMPT": "0"}
        return subprocess.run([sys.executable, "-m", "tools", *words], cwd=self.checkout, env=env, capture_output=True, text=True,
                              check=False)

    def push_printed(self, output: str) -> None:
        """Type the command that the tool printed for a push without review."""
        line = re.search(r"^ +(git push \S+ \S+:\S+) +\(straight", output, re.MULTILINE)
        assert line, output
        subprocess.check_call([*line[1].split(), "--quiet"], cwd=self.checkout)
        subprocess.check_call(["git", "pull", "--quiet", "--ff-only"], cwd=self.checkout)

    def git(self, *words: str) -> str:
        return subprocess.check_output(["git", *words], cwd=self.checkout, text=True).strip()


def make_environments(world: World) -> None:
    """Copies of `local`: one trains, one serves; the operator is local's."""
    for name in (DEV, STAGING):
        shutil.copytree(world.checkout / "environments/local", world.checkout / "environments" / name)

    def place(values: dict[str, Any]) -> None:
        values["kuberay-operator"]["enabled"] = False
        values["nfs-provisioner"]["nodePath"]["path"] += f"/{FOLDER}"
        values["ray-cluster"]["head"].pop("dashboard")
        # Beside the local environment: the node's cores are given out only once.
        values["ray-cluster"]["head"]["cpuRequest"] = "20m"
        values["ray-cluster"]["workerGroups"][0].update(replicas=1, cpuRequest="20m")
        values["chatbot"].update(service={"type": "ClusterIP"}, strategy="RollingUpdate")
        values["chatbot"]["resources"]["requests"]["cpu"] = "20m"
        values["chatbot"]["config"]["serve"].pop("base")

    def small(values: dict[str, Any]) -> None:
        run = values["finetune-job"]["run"]
        run.update(name="promotion", evaluation={"rows": 24, "generate_rows": 2, "max_new_tokens": 8, "samples": 2})
        run["train"].update(max_steps=2)
        values["finetune-job"]["resources"].update(workers=1)

    for name in (DEV, STAGING):
        world.change(name, "site.yaml", place)
        world.change(name, "release.yaml", lambda v: v.update(chatbot={"enabled": False}))
    world.change(DEV, "finetune.yaml", small)
    world.change(STAGING, "finetune.yaml", lambda v: v.update({"finetune-job": {"enabled": False}}))
    world.change(STAGING, "site.yaml", lambda v: v["ray-cluster"].update(enabled=False))
    watched = [environments.namespace(n) for n in ("local", DEV)]
    world.change("local", "site.yaml", lambda v: v["kuberay-operator"].update(watchNamespaces=watched))


def make_storage(folder: Path, models: Path) -> None:
    """An empty storage with the base model (the same files, not copied)."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(models, folder / "models", copy_function=os.link)
    for name in ("runs", "chatbot"):
        (folder / name).mkdir()
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        os.chown(path, OWNER, OWNER)


@pytest.fixture(scope="module")
def world(shared_checkout, push, api, layout, wait_for) -> Iterator[World]:
    world = World(shared_checkout, api, lambda name: status.environment(api, name, layout), layout.storage / FOLDER)
    core, custom = client.CoreV1Api(api), client.CustomObjectsApi(api)
    for name in (DEV, STAGING):  # of a test that was killed
        remove(core, custom, name)
    make_storage(world.storage, layout.storage / "models")
    make_environments(world)
    push(world.checkout, "Two more environments")
    yield world
    subprocess.check_call(["git", "reset", "--quiet", "--hard"], cwd=world.checkout)
    for name in (DEV, STAGING):
        shutil.rmtree(world.checkout / "environments" / name)
    push(world.checkout, "Without them")
    for name in (DEV, STAGING):
        wait_for(lambda: world.state(name).sync == "unknown", 120, f"the end of {name}'s Application")  # noqa: B023
        remove(core, custom, name)
    shutil.rmtree(world.storage)


def finished_run(world: World, wait_for: Callable[..., Any], other_than: str = "") -> dict[str, Any]:
    """The report of dev's run, when it has ended."""
    def ended() -> str:
        state = world.state(DEV)
        if state.run is None or state.run.name == other_than:
            return ""
        assert not state.failure, state.failure
        return state.run.name if state.run_ended else ""

    return world.report(wait_for(ended, 900, "dev's run"))


def settled(world: World, wait_for: Callable[..., Any], name: str) -> None:
    """Argo CD has everything as git says, and all of it is well."""
    wait_for(lambda: (s := world.state(name)).sync == "Synced" and s.health == "Healthy" and not s.message, 180,
             f"{name} Synced and Healthy")


def serves(world: World, wait_for: Callable[..., Any], report: dict[str, Any]) -> None:
    expected = (report["run"], report["checkpoint_sha256"])
    begin = time.monotonic()
    wait_for(lambda: world.served() == expected, 240, f"staging serving {expected}, not {world.served()}")
    print(f"staging serves {report['run']} {time.monotonic() - begin:.0f} s after the push")


def test_a_good_run_is_promoted_and_served(world, wait_for):
    world.good = finished_run(world, wait_for)
    run, digest = world.good["run"], world.good["checkpoint_sha256"]
    done = world.tool("promote", "--from", DEV, "--to", STAGING)
    assert done.returncode == 0, done.stderr + done.stdout
    branch = f"promote/{STAGING}/{run}"
    assert world.git("diff", "--name-only", "HEAD", branch) == f"environments/{STAGING}/release.yaml"
    message = world.git("show", "-s", "--format=%B", branch)
    for evidence in (run, digest, "loss: improves by", f"Promoted-From: {DEV}", f"{world.good['tuned']['loss']:.4g}"):
        assert evidence in message, message
    world.push_printed(done.stdout)
    serves(world, wait_for, world.good)
    settled(world, wait_for, STAGING)


def test_a_worse_run_is_refused(world, push, wait_for):
    world.change(DEV, "finetune.yaml", lambda v: v["finetune-job"]["run"]["train"].update(learning_rate=0.02))
    push(world.checkout, "A ruinous learning rate")
    world.bad = finished_run(world, wait_for, other_than=world.good["run"])
    assert world.bad["tuned"]["loss"] > world.bad["base"]["loss"]
    done = world.tool("promote", "--from", DEV, "--to", STAGING)
    assert done.returncode != 0
    print(done.stderr)
    assert f"The gate of {STAGING}" in done.stderr and world.bad["run"] in done.stderr
    assert re.search(r"- loss: improves by -.*needed: above 0", done.stderr), done.stderr
    assert world.git("branch", "--list", f"promote/{STAGING}/{world.bad['run']}") == ""
    assert world.served() == (world.good["run"], world.good["checkpoint_sha256"])


def test_an_override_is_recorded_and_a_rollback_returns(world, wait_for):
    done = world.tool("promote", "--from", DEV, "--to", STAGING, "--force", "--reason", "to show the rollback")
    assert done.returncode == 0, done.stderr
    world.push_printed(done.stdout)
    assert "Gate-Overridden: to show the rollback" in world.git("show", "-s", "--format=%B", "HEAD")
    serves(world, wait_for, world.bad)
    done = world.tool("rollback", STAGING)
    assert done.returncode == 0, done.stderr
    world.push_printed(done.stdout)
    serves(world, wait_for, world.good)
    settled(world, wait_for, STAGING)


def test_reverting_the_edit_finds_the_old_run_finished(world, push, wait_for):
    runs = {p.name: p.stat().st_mtime for p in (world.storage / "runs").glob("*/report.json")}
    world.git("revert", "--no-edit", world.git("log", "--format=%H", "--grep", "A ruinous learning rate", "-1"))
    world.git("push", "--quiet", "origin", "HEAD:main")
    wait_for(lambda: (s := world.state(DEV)).sync == "Synced" and s.run is not None and s.run.name == world.good["run"], 120, "the old run")
    assert world.state(DEV).run_ended
    assert {p.name: p.stat().st_mtime for p in (world.storage / "runs").glob("*/report.json")} == runs


def test_a_run_without_its_dataset_fails_with_its_name_and_the_next_push_heals(world, push, wait_for):
    world.change(DEV, "finetune.yaml", lambda v: v["finetune-job"]["run"].update(
        data={"path": "data/nowhere.jsonl", "format": "instruction", "max_tokens": 256}))
    push(world.checkout, "A dataset that is not there")
    failed = wait_for(lambda: (r := world.state(DEV).run) and r.job == "FAILED" and r, 400, "a failed run")
    print(failed.message[-600:])
    assert "nowhere.jsonl" in failed.message
    assert "nowhere.jsonl" in world.state(DEV).failure
    assert world.served() == (world.good["run"], world.good["checkpoint_sha256"])
    world.git("revert", "--no-edit", "HEAD")
    world.git("push", "--quiet", "origin", "HEAD:main")
    wait_for(lambda: (s := world.state(DEV)).run_ended and s.run.name == world.good["run"], 120, "the good run as the wanted one")
    settled(world, wait_for, DEV)


def test_a_missing_secret_is_named_and_the_old_pod_goes_on(world, push, wait_for, layout, settings):
    pods = {p.metadata.uid for p in client.CoreV1Api(world.api).list_namespaced_pod(environments.namespace(STAGING)).items}
    world.change(STAGING, "site.yaml", lambda v: v["chatbot"].update(secrets=[{"secretName": "nowhere", "mountPath": "/secrets"}]))
    push(world.checkout, "A Secret that nobody made")
    wait_for(lambda: any("Deployment llm-finetune-chatbot" in line for line in world.state(STAGING).waiting), 90, "a Deployment that waits")
    print(*world.state(STAGING).waiting, sep="\n")
    wait_for(lambda: 'secret "nowhere" not found' in status.text(world.api, layout, settings), 120, "the Secret's name in make status")
    assert world.served() == (world.good["run"], world.good["checkpoint_sha256"])
    world.git("revert", "--no-edit", "HEAD")
    world.git("push", "--quiet", "origin", "HEAD:main")
    settled(world, wait_for, STAGING)
    assert world.served() == (world.good["run"], world.good["checkpoint_sha256"])
    wait_for(lambda: pods == {p.metadata.uid for p in client.CoreV1Api(world.api).list_namespaced_pod(
        environments.namespace(STAGING)).items}, 60, "the same pods as before")


def test_a_deleted_ray_cluster_comes_back_and_nothing_trains_again(world, wait_for):
    custom = client.CustomObjectsApi(world.api)
    where = (*status.RAY, environments.namespace(DEV), "rayclusters")

    def found() -> list[str]:
        return [c["metadata"]["uid"] for c in custom.list_namespaced_custom_object(*where)["items"]
                if "deletionTimestamp" not in c["metadata"]]

    before = found()
    reports = {p.name: p.stat().st_mtime for p in (world.storage / "runs").glob("*/report.json")}

    custom.delete_namespaced_custom_object(*where, "llm-finetune")
    begin = time.monotonic()
    wait_for(lambda: found() and found() != before, HEAL, "the RayCluster")
    print(f"RayCluster: there again after {time.monotonic() - begin:.0f} s")
    settled(world, wait_for, DEV)
    assert {p.name: p.stat().st_mtime for p in (world.storage / "runs").glob("*/report.json")} == reports
    assert world.state(DEV).run_ended
