"""Looks at a cluster before one trains on it.

    make site-check ENV=dev

Starts a pod on every node that the environment's worker groups choose, measures in and between them (trainer/sitecheck), compares with
what `plan` says that the run needs, and takes everything away. Prints a table, writes site-check.html and site-check.json. Exit code 1 if
the run cannot go.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from tools import diff, environments
from tools.errors import OperatorError
from tools.site import page
from tools.site.judge import Finding, judge
from tools.site.pods import Group, Node, Pod, Pods, choose, configuration, groups, quantity, rounds

MOST_NODES = 32
LIFE = 1800
"""Seconds after which the pods end by themselves."""
Say = Callable[[str], None]


def place(nodes: list[Node], found: list[Group], limit: int = MOST_NODES) -> list[Pod]:
    """One pod a node, with the GPUs that are free there; two on a lone node, so that there is a pair."""
    by_name = {g.name: g for g in found}
    pods = []
    for node in [n for n in nodes if n.group and n.ready][:limit]:
        group = by_name[node.group]
        free = int(node.allocatable.get(group.gpu_resource, 0)) - node.gpus_used if group.gpus else 0
        pods.append(Pod("", node.name, group.name, max(0, free), group.storage, label=node.name))
    if len(pods) == 1:
        one = pods[0]
        pods = [dataclasses.replace(one, label=f"{one.node} (1)"), dataclasses.replace(one, gpus=0, label=f"{one.node} (2)")]
    return pods


class Measuring:
    """All measurements, in an order in which they do not disturb each other."""

    def __init__(self, pods: Pods, megabytes: int, say: Say) -> None:
        self.pods, self.megabytes, self.say = pods, megabytes, say
        self.live = [p for p in pods.pods if p.running]
        self.directory = f"{self.live[0].storage}/.site-check" if self.live else ""

    def _each(self, calls: Iterable[tuple[Pod, tuple[str, ...]]]) -> list[dict[str, Any]]:
        """Calls at the same time; answers in their order."""
        wanted = list(calls)
        with ThreadPoolExecutor(max(1, len(wanted))) as pool:
            return [f.result() for f in [pool.submit(self.pods.call, pod, *words) for pod, words in wanted]]

    def facts(self) -> list[dict[str, Any]]:
        self.say("nodes")
        return self._each((p, ("facts",)) for p in self.live)

    def cuda(self) -> list[dict[str, Any]]:
        """None where a pod has no GPU."""
        having = [p for p in self.live if p.gpus]
        if having:
            self.say("GPUs")
        answers = {p.label: a for p, a in zip(having, self._each((p, ("cuda",)) for p in having), strict=True)}
        return [answers.get(p.label, {}) for p in self.live]

    def network(self, seconds: float) -> list[dict[str, Any]]:
        found, order = [], rounds(len(self.live))
        for number, pairs in enumerate(order, 1):
            self.say(f"network, round {number} of {len(order)}")
            for turned in (False, True):  # one direction after the other
                ends = [(self.live[b], self.live[a]) if turned else (self.live[a], self.live[b]) for a, b in pairs]
                answers = self._each((a, ("tcp", "--host", b.address, "--seconds", str(seconds))) for a, b in ends)
                found += [{"from": a.label, "to": b.label, **answer} for (a, b), answer in zip(ends, answers, strict=True)]
        return found

    def storage(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(by pod, between pods)"""
        at, each = ("--directory", self.directory), []
        self.pods.call(self.live[0], "remove", *at)  # what a killed check has left
        for number, pod in enumerate(self.live):
            self.say(f"storage from {pod.label}")
            found = self.pods.call(pod, "fsync", *at)
            if "error" not in found:
                found |= self.pods.call(pod, "write", *at, "--name", f"file-{number}", "--megabytes", str(self.megabytes))
            each.append(found)
        able = [i for i, found in enumerate(each) if "error" not in found]
        for number in able:  # each reads what another wrote, so that no cache of its own answers
            other = able[(able.index(number) + 1) % len(able)]
            each[number] |= self.pods.call(self.live[number], "read", *at, "--name", f"file-{other}")
        between: dict[str, Any] = {}
        if able:
            self.say("storage from all at once")
            begin = time.monotonic()
            answers = self._each((self.live[i], ("write", *at, "--name", f"file-{i}", "--megabytes", str(self.megabytes))) for i in able)
            if all("error" not in a for a in answers):
                between["write_together_mb_s"] = sum(a["write_mb_s"] for a in answers)
                between["write_together_s"] = time.monotonic() - begin
        if len(able) > 1:
            a, b = self.live[able[0]], self.live[able[1]]
            self.say("rename and locks between two pods")
            for name, first, second in (("renames", ("renames",), ("watches",)), ("locks", ("holds",), ("tries",)),
                                        ("races", ("races", "--name", "a"), ("races", "--name", "b"))):
                inside = ("--directory", f"{self.directory}/{name}")
                between[name] = self._each([(a, (*first, *inside)), (b, (*second, *inside))])
        return each, between

    def collectives(self) -> list[dict[str, Any]]:
        """All-reduce inside each node that has several GPUs, then over all pods: NCCL where there are GPUs, else gloo."""
        having = [p for p in self.live if p.gpus]
        found = []
        for pod in [p for p in having if p.gpus > 1]:
            self.say(f"all-reduce inside {pod.label}")
            answer = self.pods.call(pod, "all-reduce", "--host", pod.address, "--local", str(pod.gpus), "--world", str(pod.gpus), "--gpu",
                                    "--megabytes", "256")
            found.append({"over": f"the {pod.gpus} GPUs of {pod.label}", "nodes": 1, **answer})
        members = having if len({p.node for p in having}) > 1 or (having and not found) else [] if having else self.live
        if len(members) > 1 or sum(p.gpus for p in members) > 1:
            self.say(f"all-reduce over {len(members)} pods")
            world, first, calls = sum(max(1, p.gpus) for p in members), 0, []
            for pod in members:
                local = max(1, pod.gpus)
                calls.append((pod, ("all-reduce", "--host", members[0].address, "--first", str(first), "--local", str(local), "--world",
                                    str(world), *(("--gpu", "--megabytes", "256") if pod.gpus else ("--megabytes", "32")))))
                first += local
            answers = self._each(calls)
            bad = next((a for a in answers if "error" in a), None)
            found.append({"over": f"{world} {'GPUs' if having else 'processes'} of {len(members)} pods",
                          "nodes": len({p.node for p in members}), **(bad or max(answers, key=lambda a: a["seconds"]))})
        return found

    def plan(self, *more: str) -> dict[str, Any]:
        return self.pods.call(self.live[0], "plan", *more)

    def clean(self) -> None:
        """Take the directory on the storage away. Through every pod: each ends its own measurements first, which would make it again."""
        errors = [self.pods.call(pod, "remove", "--directory", self.directory, timeout=60).get("error", "") for pod in self.live]
        if errors and not any(not error or "FileNotFoundError" in error for error in errors):
            self.say(f"{self.directory} was not removed: {errors[-1]}")


def measured_gbps(network: list[dict[str, Any]], collectives: list[dict[str, Any]]) -> float:
    """Bandwidth between nodes that training can count on: NCCL's over several nodes, else the slowest pair's."""
    for one in collectives:
        if one["nodes"] > 1 and one.get("backend") == "nccl" and "gbps" in one:
            return float(one["gbps"])
    return min((p["gbps"] for p in network if "gbps" in p), default=0.0)


def cluster(context: str, name: str) -> tuple[client.ApiClient, dict[str, Any]]:
    """The cluster's API and `global.images` as Argo CD gives them to the environment."""
    live = diff.connect(context)
    if live is None:
        raise OperatorError("No cluster answers. Set KUBECONFIG (or CONTEXT), or bring the local cluster up with `make up`.")
    try:
        images = live.images(name)
    except ApiException as error:
        if error.status not in (403, 404):
            raise
        images = {}  # without Argo CD, or without the right to see it: the images of release.yaml
    return live.core.api_client, images


def run(name: str, *, context: str = "", megabytes: int = 512, seconds: float = 2.0, wait: float = 600.0,
        say: Say = print) -> dict[str, Any]:
    """Check the cluster for an environment; returns everything that was seen (see `judge`)."""
    begin = time.monotonic()
    api, images = cluster(context, name)
    environment = environments.load(name)
    objects = diff.render(name, images=images)
    values = environments.merge(environments.chart_values(), environment.values)
    found = groups(objects, values["global"]["gpu"]["resourceName"])
    config, namespace = configuration(objects), environment.namespace
    pods = Pods(api, namespace, say)
    nodes = choose(pods.core.list_node().items, found)
    for node in nodes:
        if node.group and any(g.gpus for g in found if g.name == node.group):
            node.gpus_used = pods.used_gpus(node.name, found[0].gpu_resource)
    wanted = place(nodes, found)
    result: dict[str, Any] = {
        "environment": name, "namespace": namespace, "time": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "nodes": [{k: v for k, v in dataclasses.asdict(n).items() if k not in ("labels", "allocatable")} for n in nodes],
        "groups": [{"name": g.name, "replicas": g.replicas, "gpus": g.gpus, "selector": dict(g.selector), "cpus": _ray_cpus(objects, g)}
                   for g in found],
        "one_node": len({p.node for p in wanted}) == 1, "pods": [], "network": [], "storage": {}, "collectives": [], "plan": {}}
    with pods:
        say(f"{len(wanted)} pods on {len({p.node for p in wanted})} nodes")
        pods.start(wanted, {g.name: g for g in found}, config, LIFE)
        pods.wait(wait)
        measuring = Measuring(pods, megabytes, say)
        try:
            _measure(measuring, result, seconds, bool(config))
        finally:
            measuring.clean()
    result["seconds"] = time.monotonic() - begin
    return result


def _ray_cpus(objects: diff.Objects, group: Group) -> float:
    """Cores that Ray gives out on a worker of a group."""
    for key, manifest in objects.items():
        spec = manifest["spec"] if key[0] == "RayCluster" else manifest["spec"].get("rayClusterSpec", {}) if key[0] == "RayJob" else {}
        for one in spec.get("workerGroupSpecs", []):
            if one["groupName"] == group.name:
                return quantity(one["rayStartParams"]["num-cpus"])
    return 0.0


def _measure(measuring: Measuring, result: dict[str, Any], seconds: float, has_run: bool) -> None:
    live = measuring.live
    rows = {p.label: {**dataclasses.asdict(p), "facts": {}} for p in measuring.pods.pods}
    result["pods"] = list(rows.values())
    if not live:
        return
    for pod, facts in zip(live, measuring.facts(), strict=True):
        rows[pod.label]["facts"] = facts
    if not any(rows[p.label]["facts"].get("cpus") for p in live):
        return  # nothing can be measured; the findings say why
    if has_run:
        result["plan"] = measuring.plan()
    for pod, found in zip(live, measuring.cuda(), strict=True):
        rows[pod.label]["cuda"] = found
    result["network"] = measuring.network(seconds)
    each, result["storage"] = measuring.storage()
    for pod, found in zip(live, each, strict=True):
        rows[pod.label]["storage"] = found
    result["collectives"] = measuring.collectives()
    if not result["one_node"]:
        result["measured_gbps"] = measured_gbps(result["network"], result["collectives"])
        if result["plan"] and "error" not in result["plan"] and result["measured_gbps"]:
            result["plan_measured"] = measuring.plan("--network-gbps", f"{result['measured_gbps']:.3f}")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: argparse.Namespace) -> int:
    """Check, print, write. Returns 1 if the run cannot go."""
    signal.signal(signal.SIGTERM, _interrupt)  # the pods go on a kill as they do on Ctrl-C
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    result = run(arguments.environment, context=arguments.context, megabytes=arguments.megabytes, seconds=arguments.seconds,
                 wait=arguments.wait, say=lambda text: print(f"... {text}", flush=True))
    findings: list[Finding] = judge(result)
    result["findings"] = [dataclasses.asdict(f) for f in findings]
    result["verdict"] = page.verdict(result, findings)
    (folder / "site-check.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "site-check.html").write_text(page.html(result, findings), encoding="utf-8")
    print(f"\n{page.text(result, findings)}\n{folder / 'site-check.html'}, {folder / 'site-check.json'}")
    return int(any(f.level == "stop" for f in findings))


def add_parser(commands: Any) -> None:
    """`site-check ENV`; CONTEXT also from the environment, as make passes it."""
    parser: argparse.ArgumentParser = commands.add_parser("site-check", help="look at a cluster before training on it")
    parser.add_argument("environment")
    parser.add_argument("--context", default=os.environ.get("CONTEXT", ""), help="kubeconfig context")
    parser.add_argument("--out", default=os.environ.get("OUT", "."), help="folder of site-check.html and site-check.json")
    parser.add_argument("--megabytes", type=int, default=512, help="written to the storage from each node")
    parser.add_argument("--seconds", type=float, default=2.0, help="of sending, each direction of a pair of nodes")
    parser.add_argument("--wait", type=float, default=600.0, help="seconds that the pods may take to start, image pull included")
    parser.set_defaults(run=main)
