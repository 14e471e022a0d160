"""Many pushes and many environments on the local cluster: how long Argo CD takes, and what memory it and etcd hold.

    python benchmarks/gitops.py --out benchmarks/results/gitops.json                # 50 pushes, then 20 environments one after another
    python benchmarks/gitops.py --pushes 10 --environments 5

A push changes one harmless value of the local environment (a network in a NetworkPolicy); it has converged when the object in the cluster
says it. An environment is a folder with chatbot, runs, Ray and operator off; it has converged when its Application is Synced and Healthy.
No run may start or be lost meanwhile. Everything is taken back at the end. Needs the cluster of `make up` and root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml
from kubernetes import client

from tools import environments
from tools.cluster import kubernetes, registry, status
from tools.cluster.settings import Settings
from tools.layout import REPOSITORY, Layout
from tools.remove import remove

PROCESSES = ("argocd-application-controller", "argocd-applicationset-controller", "argocd-repo-server", "redis-server", "etcd",
             "kube-apiserver")
LIMIT = 180.0
"""Seconds after which a push or an environment counts as lost."""


def memory() -> dict[str, float]:
    """MiB that each of PROCESSES has resident, and the size of etcd's file on the disk (by the processes' names under /proc)."""
    found = dict.fromkeys(PROCESSES, 0.0)
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            name = Path((entry / "cmdline").read_bytes().split(b"\0")[0].decode().split(" ")[0]).name if entry.name.isdigit() else ""
            if name in found:
                fields = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines())
                found[name] += int(fields.get("VmRSS", "0 kB").split()[0]) / 1024
    return {k: round(v, 1) for k, v in found.items()}


def etcd_megabytes(layout: Layout) -> float:
    """Size of etcd's database."""
    return round((layout.state / "etcd/member/snap/db").stat().st_size / 2**20, 1)


class Bench:
    """A user's clone of the deployed repository, and questions about the cluster."""

    def __init__(self, layout: Layout, settings: Settings, folder: Path) -> None:
        self.layout, self.folder = layout, folder
        api = kubernetes.api_client(layout)
        self.api, self.core, self.custom, self.networks = (api, client.CoreV1Api(api), client.CustomObjectsApi(api),
                                                           client.NetworkingV1Api(api))
        self.repository = registry.git_repository(layout, settings)
        self.git("clone", "--quiet", "--branch", registry.BRANCH, str(self.repository), str(folder), at=folder.parent)
        for key, value in (("user.name", "A user"), ("user.email", "user@example.com")):
            self.git("config", key, value)
        self.before = self.git("rev-parse", "HEAD")

    def git(self, *words: str, at: Path | None = None) -> str:
        return subprocess.check_output(["git", *words], cwd=at or self.folder, text=True).strip()

    def push(self, message: str) -> float:
        """Commit everything and push. Returns the time of the push."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)
        self.git("push", "--quiet", "origin", f"HEAD:{registry.BRANCH}")
        return time.monotonic()

    def wait(self, since: float, question: Callable[[], bool]) -> float:
        """Seconds until the answer is yes; infinity if it is not within LIMIT."""
        while not question():
            if time.monotonic() - since > LIMIT:
                return float("inf")
            time.sleep(0.25)
        return time.monotonic() - since

    def runs(self) -> dict[str, str]:
        """Every RayJob of the local environment and its state."""
        return {r.name: r.job for r in status.runs(self.api, "local", self.layout)}

    def settled(self, name: str) -> bool:
        state = status.environment(self.api, name, self.layout)
        return state.sync == "Synced" and state.health == "Healthy" and not state.message

    def networks_now(self) -> list[str]:
        policy: Any = self.networks.read_namespaced_network_policy("llm-finetune-ray-cluster", environments.namespace("local"))
        return [peer.ip_block.cidr for rule in policy.spec.ingress for peer in rule._from or [] if peer.ip_block]

    def one_push(self, number: int) -> float:
        """Change one value; returns the seconds until the cluster has it."""
        network = f"10.255.{number // 256}.{number % 256}/32"
        path = self.folder / "environments/local/site.yaml"
        values = yaml.safe_load(path.read_text())
        values["ray-cluster"]["networkPolicy"] = {"dashboardClients": [network]}
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return self.wait(self.push(f"Network {number}"), lambda: network in self.networks_now())

    def one_environment(self, name: str) -> float:
        """Add an environment with everything but its storage off; returns the seconds until it is there."""
        here = self.folder / "environments" / name
        shutil.copytree(self.folder / "environments/local", here)
        release = yaml.safe_load((here / "release.yaml").read_text())
        release["chatbot"] = {"enabled": False}
        (here / "release.yaml").write_text(yaml.safe_dump(release))
        (here / "finetune.yaml").write_text(yaml.safe_dump({"finetune-job": {"enabled": False}}))
        site = yaml.safe_load((here / "site.yaml").read_text())
        for part in ("kuberay-operator", "ray-cluster"):
            site[part] = {"enabled": False}
        site.pop("chatbot")
        (here / "site.yaml").write_text(yaml.safe_dump(site))
        return self.wait(self.push(f"Environment {name}"), lambda: self.settled(name))

    def restore(self, names: list[str]) -> None:
        """main as it was before; nothing left of the environments."""
        self.git("push", "--quiet", "--force", "origin", f"{self.before}:refs/heads/{registry.BRANCH}")
        for name in names:
            if self.wait(time.monotonic(), lambda: status.environment(self.api, name, self.layout).sync == "unknown") < LIMIT:  # noqa: B023
                remove(self.core, self.custom, name, say=lambda _: None)
        self.wait(time.monotonic(), lambda: self.settled("local"))


def summary(seconds: list[float]) -> dict[str, Any]:
    """Figures of a row of measurements; the first and last fifth tell whether it grows."""
    fifth = max(1, len(seconds) // 5)
    converged = [s for s in seconds if s < LIMIT]
    shown = {"count": len(seconds), "converged": len(converged)}
    if not converged:
        return shown
    return {**shown, "median_s": round(statistics.median(converged), 1), "max_s": round(max(converged), 1),
            "first_fifth_mean_s": round(statistics.mean(converged[:fifth]), 1),
            "last_fifth_mean_s": round(statistics.mean(converged[-fifth:]), 1), "each_s": [round(s, 1) for s in converged]}


@contextlib.contextmanager
def bench(names: list[str]) -> Iterator[Bench]:
    layout = Layout()
    with tempfile.TemporaryDirectory() as folder:
        found = Bench(layout, Settings(), Path(folder) / "clone")
        try:
            yield found
        finally:
            found.restore(names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pushes", type=int, default=50)
    parser.add_argument("--environments", type=int, default=20)
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    options = parser.parse_args()
    names = [f"local-bench-{i:02d}" for i in range(1, options.environments + 1)]
    layout = Layout()
    result: dict[str, Any] = {"memory_mib": {"before": memory()}, "etcd_file_mib": {"before": etcd_megabytes(layout)}}

    def note(when: str) -> None:
        result["memory_mib"][when], result["etcd_file_mib"][when] = memory(), etcd_megabytes(layout)

    with bench(names) as found:
        runs = found.runs()
        pushes, added = [], []
        for number in range(options.pushes):
            pushes.append(found.one_push(number))
            print(f"push {number + 1}: {pushes[-1]:.1f} s", flush=True)
        note("after the pushes")
        for name in names:
            added.append(found.one_environment(name))
            print(f"{name}: {added[-1]:.1f} s", flush=True)
        note("with the environments")
        result |= {"pushes": summary(pushes), "environments": summary(added), "runs_unchanged": found.runs() == runs}
    note("after removing them")
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, text=True).strip()
    result |= {"cores": os.cpu_count(), "commit": commit, "date": time.strftime("%Y-%m-%d")}
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    good = result["runs_unchanged"] and all(result[k]["converged"] == result[k]["count"] for k in ("pushes", "environments"))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
