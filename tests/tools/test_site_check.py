"""The site check's pods as they would be made, what is said of good and bad measurements, and that nothing is left behind."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from tests.charts.test_objects import restricted
from tests.tools.test_golden import GOLDEN
from tools.diff import Objects, key_of
from tools.errors import OperatorError
from tools.layout import REPOSITORY
from tools.runid import HelmLoader
from tools.site import check, page, pods
from tools.site.judge import Finding, judge
from tools.site.pods import Group, Pod

GPU = "nvidia.com/gpu"


def rendered(name: str) -> Objects:
    documents = yaml.load_all((GOLDEN / f"{name}.yaml").read_text(encoding="utf-8"), HelmLoader)
    return {key_of(m): m for m in documents if m}


def node(name: str, labels: dict[str, str] | None = None, gpus: int = 0, ready: str = "True", taints: list[tuple[str, str]] | None = None,
         cordoned: bool = False) -> client.V1Node:
    allocatable = {"cpu": "64", "memory": "900Gi", "pods": "110", **({GPU: str(gpus)} if gpus else {})}
    return client.V1Node(
        metadata=client.V1ObjectMeta(name=name, labels=labels or {}),
        spec=client.V1NodeSpec(unschedulable=cordoned or None, taints=[client.V1Taint(key=k, effect=e) for k, e in taints or []]),
        status=client.V1NodeStatus(allocatable=allocatable,
                                   conditions=[client.V1NodeCondition(type="Ready", status=ready, message="kubelet stopped posting")]))


A100, H100 = ({"nvidia.com/gpu.product": p} for p in ("NVIDIA-A100-SXM4-80GB", "NVIDIA-H100-80GB-HBM3"))
SITE = [node("a1", A100, 6), node("a2", A100, 6), node("h1", H100, 4), node("plain"), node("sick", A100, 6, ready="Unknown")]


def groups_of(name: str) -> list[Group]:
    return pods.groups(rendered(name), GPU)


# --- pods


def test_nodes_are_chosen_as_the_scheduler_would() -> None:
    found = {n.name: n for n in pods.choose(SITE, groups_of("dev"))}
    assert {n: f.group for n, f in found.items()} == {"a1": "a100", "a2": "a100", "h1": "h100", "plain": "", "sick": "a100"}
    assert (found["a1"].fits, found["h1"].fits) == (3, 2)
    assert not found["sick"].ready and "kubelet" in found["sick"].why
    placed = check.place(list(found.values()), groups_of("dev"))
    assert [(p.node, p.gpus) for p in placed] == [("a1", 6), ("a2", 6), ("h1", 4)]
    found["a2"].gpus_used = 4
    assert [p.gpus for p in check.place(list(found.values()), groups_of("dev"))] == [6, 2, 4]


def test_taints_and_cordons() -> None:
    (tainted, cordoned) = pods.choose([node("t", taints=[("dedicated", "NoSchedule")]), node("c", cordoned=True)], groups_of("local"))
    assert tainted.group == "" and cordoned.group == "cpu" and not cordoned.ready
    (group,) = groups_of("local")
    tolerant = Group(group.name, group.replicas, {**group.pod, "tolerations": [{"key": "dedicated", "operator": "Exists"}]}, GPU)
    assert pods.choose([node("t", taints=[("dedicated", "NoSchedule")])], [tolerant])[0].group == "cpu"


def test_a_lone_node_gets_two_pods_and_the_gpus_go_to_one() -> None:
    placed = check.place(pods.choose([node("h1", H100, 4)], groups_of("dev")), groups_of("dev"))
    assert [(p.label, p.gpus) for p in placed] == [("h1 (1)", 4), ("h1 (2)", 0)]


@pytest.mark.parametrize("environment", ["local", "dev"])
def test_the_job_is_a_worker_that_measures(environment: str) -> None:
    for group in groups_of(environment):
        one = Pod("site-check-abc123-0", "n", group.name, group.gpus, group.storage)
        manifest = pods.job(one, group, "site-check-abc123", 1800, '{"run": 1}')
        kubernetes_validate.validate(manifest, "1.33", strict=True)
        spec = manifest["spec"]["template"]["spec"]
        assert restricted(spec) == [] and spec["automountServiceAccountToken"] is False
        (container,) = spec["containers"]
        worker = group.container
        assert container["image"] == worker["image"] and spec.get("imagePullSecrets") == group.pod.get("imagePullSecrets")
        assert container["resources"]["limits"].get(GPU, 0) == group.gpus
        assert {"name": "LLM_FINETUNE_CONFIG", "value": '{"run": 1}'} in container["env"]
        assert all("value" in e for e in container["env"]), "no secrets"
        assert {m["name"] for m in container["volumeMounts"]} == {"storage", "tmp", "shm", "module"} == {v["name"] for v in spec["volumes"]}
        assert (manifest["spec"]["ttlSecondsAfterFinished"], manifest["spec"]["activeDeadlineSeconds"]) == (60, 1800)
        assert {"app.kubernetes.io/name", "app.kubernetes.io/instance"} <= set(manifest["spec"]["template"]["metadata"]["labels"])


def test_a_pod_without_gpus_is_handed_none() -> None:
    group = groups_of("dev")[0]
    manifest = pods.job(Pod("j", "n", group.name, 0, group.storage), group, "i", 60, "")
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    assert {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in container["env"] and GPU not in container["resources"]["limits"]


def test_companions() -> None:
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": "u"}
    module, policy = pods.companions("site-check-abc123", [owner])
    for manifest in (module, policy):
        kubernetes_validate.validate(manifest, "1.33", strict=True)
        assert manifest["metadata"]["ownerReferences"] == [owner]
    assert list(module["data"]) == pods.module_files() and "__main__.py" in module["data"]
    assert len(json.dumps(module)) < 900_000, "a ConfigMap holds 1 MiB"
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert f"COPY trainer {pods.MODULE_IN_IMAGE.removesuffix('/sitecheck')}" in (REPOSITORY / "images/trainer/Dockerfile").read_text()


def test_the_run_that_is_compared_with() -> None:
    config = json.loads(pods.configuration(rendered("local")))
    assert config["run"]["name"] == "smollm2-pubmedqa" and config["storage"] == "/storage"
    assert pods.configuration({}) == ""
    with pytest.raises(OperatorError, match="no Ray cluster"):
        pods.groups({}, GPU)


@pytest.mark.parametrize("count", [2, 3, 4, 7, 12])
def test_every_pair_once_and_nobody_twice_at_a_time(count: int) -> None:
    order = pods.rounds(count)
    pairs = [tuple(sorted(p)) for r in order for p in r]
    assert len(pairs) == len(set(pairs)) == count * (count - 1) // 2
    assert all(len({i for p in r for i in p}) == 2 * len(r) for r in order)
    assert len(order) == count - 1 + count % 2


@pytest.mark.parametrize(("text", "value"), [("500m", 0.5), ("16Gi", 16 * 2**30), ("96", 96.0), ("1e3", 1000.0), ("2T", 2e12)])
def test_quantities(text: str, value: float) -> None:
    assert pods.quantity(text) == value


@pytest.mark.parametrize(("message", "found"), [
    ('Successfully pulled image "r/t@sha256:1" in 1m2.5s (1m2.5s including waiting). Image size: 6000000000 bytes.', (62.5, 6_000_000_000)),
    ('Successfully pulled image "r/t" in 350ms (350ms including waiting).', (0.35, 0)),
    ('Container image "r/t" already present on machine', (None, 0)),
])
def test_image_pulls(message: str, found: tuple[float | None, int]) -> None:
    assert pods.pulled([message])[1] == found[1] and pods.pulled([message])[0] == (found[0] and pytest.approx(found[0]))


class Cluster:
    """The API as far as the check's objects go: what was made is listed, until it is deleted."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses, self.there, self.calls = refuses, {"jobs": [], "maps": [], "policies": []}, []

    def _make(self, kind: str, body: dict[str, Any]) -> Any:
        if kind == self.refuses:
            raise ApiException(status=403, reason="Forbidden")
        self.there[kind].append(body)
        return SimpleNamespace(metadata=SimpleNamespace(name=body["metadata"]["name"], uid="u"))

    def create_namespaced_job(self, _: str, body: dict[str, Any]) -> Any:
        return self._make("jobs", body)

    def create_namespaced_config_map(self, _: str, body: dict[str, Any]) -> Any:
        return self._make("maps", body)

    def create_namespaced_network_policy(self, _: str, body: dict[str, Any]) -> Any:
        return self._make("policies", body)

    def _drop(self, kind: str, selector: str) -> None:
        key, _, value = selector.partition("=")
        self.there[kind] = [b for b in self.there[kind] if b["metadata"]["labels"].get(key) != value]

    def delete_collection_namespaced_job(self, _: str, label_selector: str, propagation_policy: str) -> None:
        assert propagation_policy == "Background"
        self._drop("jobs", label_selector)

    def delete_collection_namespaced_config_map(self, _: str, label_selector: str) -> None:
        self._drop("maps", label_selector)

    def delete_collection_namespaced_network_policy(self, _: str, label_selector: str) -> None:
        self._drop("policies", label_selector)

    def list_namespaced_job(self, _: str, label_selector: str) -> Any:
        assert label_selector == "app.kubernetes.io/name=site-check"
        return SimpleNamespace(items=[SimpleNamespace(metadata=SimpleNamespace(name=b["metadata"]["name"])) for b in self.there["jobs"]])

    def list_namespaced_pod(self, _: str, label_selector: str) -> Any:
        return SimpleNamespace(items=[])


def on(cluster: Cluster) -> pods.Pods:
    made = pods.Pods(client.ApiClient(client.Configuration(host="http://127.0.0.1:9")), "ns", lambda _: None)
    made.core = made.batch = made.policies = cluster
    return made


def local_pods() -> tuple[list[Pod], dict[str, Group]]:
    (group,) = groups_of("local")
    return [Pod("", "n", group.name, 0, group.storage, label=f"n ({i})") for i in (1, 2)], {group.name: group}


@pytest.mark.parametrize("how", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_after_an_interruption(how: type[BaseException]) -> None:
    cluster, (wanted, found) = Cluster(), local_pods()

    def interrupted() -> None:
        with on(cluster) as made:
            made.start(wanted, found, "", 60)
            assert [len(v) for v in cluster.there.values()] == [2, 1, 1]
            raise how

    with pytest.raises(how):
        interrupted()
    assert [len(v) for v in cluster.there.values()] == [0, 0, 0]


def test_an_interruption_while_it_connects_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Kubernetes client turns what is raised while it connects into an ApiException, KeyboardInterrupt too."""
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kubernetes.stream.ws_client.WSClient", interrupted)
    with pytest.raises(KeyboardInterrupt):
        on(Cluster()).call(local_pods()[0][0], "facts")


def test_what_the_cluster_refuses_is_said_and_cleaned() -> None:
    cluster, (wanted, found) = Cluster(refuses="policies"), local_pods()
    with pytest.raises(OperatorError, match="403 Forbidden"), on(cluster) as made:
        made.start(wanted, found, "", 60)
    assert [len(v) for v in cluster.there.values()] == [0, 0, 0]


def test_two_checks_do_not_meet() -> None:
    cluster, (wanted, found) = Cluster(), local_pods()
    on(cluster).start(wanted, found, "", 60)
    second = on(cluster)
    with pytest.raises(OperatorError, match="delete job -l"), second:
        second.start(wanted, found, "", 60)
    assert len(cluster.there["jobs"]) == 2, "the first one's stay"


# --- what is said

GOOD_GPU = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85_520_809_984, "ecc_uncorrected": 0, "rows_pending": False,
            "rows_failed": False, "pcie": [16, 16], "mig": False, "power_limit_w": 700.0, "power_default_w": 700.0}
GOOD_DEVICE = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "memory_bytes": 85_017_493_504, "supported": True, "tflops": 712.2,
               "finite": True, "sm_clock_mhz": 1980, "slowed": []}


def pod(label: str) -> dict[str, Any]:
    return {"label": label, "node": label, "group": "h100", "gpus": 2, "running": True, "why": "", "pull_seconds": None, "image_bytes": 0,
            "start_seconds": 2.0,
            "facts": {"cpus": 8, "memory_bytes": 10**12, "cards": [{"name": "eth0", "mtu": 1450}], "driver": "580.1", "cuda_driver": "13.0",
                      "gpus": [copy.deepcopy(GOOD_GPU) for _ in range(2)]},
            "cuda": {"torch": "2.11", "cuda": "13.0", "devices": [copy.deepcopy(GOOD_DEVICE) for _ in range(2)]},
            "storage": {"free_bytes": 4 * 10**12, "fsync_ms": 1.0, "fsync_p99_ms": 4.0, "write_mb_s": 900.0, "read_mb_s": 1100.0,
                        "read_whole": True}}


def good() -> dict[str, Any]:
    """Two servers of two H100, nothing wrong."""
    tcp = {"gbps": 92.0, "latency_us": 60.0, "latency_p99_us": 90.0, "ahead_s": 0.0002}
    return {
        "environment": "dev", "namespace": "llm-finetune-dev", "time": "now", "seconds": 60.0, "one_node": False,
        "nodes": [{"name": n, "ready": True, "why": "", "group": "h100", "fits": 1, "gpus_used": 0} for n in ("n1", "n2")],
        "groups": [{"name": "h100", "replicas": 2, "gpus": 2, "cpus": 16.0, "selector": H100}],
        "pods": [pod("n1"), pod("n2")],
        "network": [{"from": "n1", "to": "n2", **tcp}, {"from": "n2", "to": "n1", **tcp, "ahead_s": -0.0002}],
        "storage": {"write_together_mb_s": 1500.0, "renames": [{"renames": 80}, {"whole": 900, "torn": 0, "missing": 0, "stale": 2}],
                    "locks": [{"held": True}, {"lock_refused": True, "flock_refused": True, "released": True, "seen_after_s": 0.1}],
                    "races": [{"won": [0, 2], "rounds": 3}, {"won": [1], "rounds": 3}]},
        "collectives": [{"over": "4 GPUs of 2 pods", "nodes": 2, "backend": "nccl", "gbps": 85.0, "seconds": 0.03}],
        "plan": {"run": "llama", "fits": True, "workers": 4, "workers_gpus": 4, "workers_cpus": 4, "nodes": 2, "network_gbps": 100,
                 "step_seconds": 2.0, "storage_bytes": 10**12, "checkpoint_bytes": 96 * 10**9, "every_minutes": 30, "host_bytes": 10**11,
                 "groups": [{"name": "all", "gpu": "H100-80GB", "gpu_memory_bytes": 84_900_000_000, "fits": True}]},
        "measured_gbps": 85.0, "plan_measured": {"step_seconds": 2.1}}


def spoilt(where: str, value: Any) -> dict[str, Any]:
    """`good` with one value replaced."""
    result: Any = good()
    node: Any = result
    *keys, last = where.split(".")
    for key in keys:
        node = node[int(key) if key.isdigit() else key]
    node[int(last) if last.isdigit() else last] = value
    return result


def test_a_good_site_passes() -> None:
    found = judge(good())
    assert {f.level for f in found} == {"ok"}, [f for f in found if f.level != "ok"]
    assert {f.area for f in found} == {"nodes", "image", "gpus", "storage", "network", "clocks", "run"}
    assert page.verdict(good(), found) == "llama can run in dev."


@pytest.mark.parametrize(("where", "value", "level", "says"), [
    ("nodes.1.ready", False, "stop", "room for 1"),
    ("nodes.0.group", "", "stop", "room for 1"),
    ("nodes.0.fits", 0, "stop", "room for 1"),
    ("nodes.1.gpus_used", 1, "warn", "held by other pods"),
    ("nodes", [], "stop", "No node takes the group h100"),
    ("pods.0.running", False, "stop", "No pod of the trainer image runs on n1"),
    ("pods.1.facts", {"error": "exec: forbidden"}, "stop", "do not run on n2: exec: forbidden"),
    ("pods.0.facts.gpus", [], "stop", "2 GPUs were given, 0 are seen"),
    ("pods.0.cuda", {"cuda": "13.0", "error": "driver too old", "devices": []}, "stop", "cannot use driver 580.1"),
    ("pods.0.cuda.devices.1.supported", False, "stop", "no code for compute capability 9.0"),
    ("pods.0.cuda.devices.1.finite", False, "stop", "not finite"),
    ("pods.0.cuda.devices.1.error", "out of memory", "stop", "matrix product failed: out of memory"),
    ("pods.0.cuda.devices.1.tflops", 500.0, "warn", "500 TFLOP/s, its fellows 712"),
    ("pods.0.cuda.devices.1.slowed", ["power brake"], "warn", "power brake"),
    ("pods.0.cuda.devices.0.memory_bytes", 42 * 10**9, "stop", "n1 has 42.0 GB"),
    ("pods.0.cuda.devices.0.name", "NVIDIA-A100-SXM4-80GB", "warn", "n1 has A100-80GB"),
    ("pods.0.facts.gpus.1.ecc_uncorrected", 3, "stop", "3 uncorrected"),
    ("pods.0.facts.gpus.1.rows_failed", True, "stop", "remapping"),
    ("pods.0.facts.gpus.1.rows_pending", True, "warn", "remapped"),
    ("pods.0.facts.gpus.1.mig", True, "warn", "MIG"),
    ("pods.0.facts.gpus.1.pcie", [4, 16], "warn", "x4 of x16"),
    ("pods.0.facts.gpus.1.power_limit_w", 400.0, "warn", "400 W of 700 W"),
    ("pods.0.facts.cards.0.mtu", 9000, "warn", "MTUs differ: [1450, 9000]"),
    ("pods.0.facts.memory_bytes", 10**9, "stop", "host's memory"),
    ("pods.1.storage", {"error": "PermissionError"}, "stop", "n2 cannot use the storage: PermissionError"),
    ("pods.1.storage.read_whole", False, "stop", "reads other bytes"),
    ("pods.1.storage.fsync_p99_ms", 900.0, "warn", "900 ms"),
    ("pods.1.storage.free_bytes", 10**11, "stop", "100.0 GB free; checkpoints and model need 1,000.0 GB"),
    ("storage.renames.1.torn", 1, "stop", "torn 1 times"),
    ("storage.renames.1.missing", 1, "stop", "missing 1 times"),
    ("storage.renames.0", {"error": "TimeoutError: x"}, "stop", "check of rename between two pods failed"),
    ("storage.locks.1.flock_refused", False, "stop", "same lock (flock)"),
    ("storage.locks.1.lock_refused", False, "stop", "the run's lock"),
    ("storage.locks.1.released", False, "stop", "release"),
    ("storage.races.1.won", [1, 2], "stop", "same hard link"),
    ("storage.write_together_mb_s", 20.0, "warn", "takes 4800 s to write"),
    ("network.0", {"from": "n1", "to": "n2", "error": "timed out"}, "stop", "n1 does not reach n2: timed out"),
    ("network.0.gbps", 9.0, "warn", "n1 to n2: 9.0 Gbit/s"),
    ("network.0.ahead_s", 7.0, "warn", "The clock of n2 is 7.0 s ahead of that of n1"),
    ("collectives.0", {"over": "4 GPUs of 2 pods", "nodes": 2, "error": "NCCL"}, "stop", "All-reduce over 4 GPUs of 2 pods failed"),
    ("plan", {}, "warn", "describes no run"),
    ("plan", {"error": "run.model: x"}, "stop", "cannot be planned: run.model: x"),
    ("plan.fits", False, "stop", "does not fit the GPU memory"),
    ("plan.workers_gpus", 8, "stop", "wants 8 GPUs; the groups have 4"),
    ("plan.workers_cpus", 99, "stop", "wants 99 CPU cores; the groups give out 32"),
    ("measured_gbps", 9.0, "warn", "counts on 100 Gbit/s between nodes; 9.0 are there. A step then takes 2.10 s instead of 2.00 s."),
])
def test_what_is_wrong_is_said_with_its_remedy(where: str, value: Any, level: str, says: str) -> None:
    result = spoilt(where, value)
    if where == "plan.fits":
        result["plan"]["groups"][0]["fits"] = False
    found = judge(result)
    (hit,) = [f for f in found if says in f.what]
    assert hit.level == level and len(hit.mend) > 10
    assert found[0].level == ("stop" if any(f.level == "stop" for f in found) else "warn"), "the worst first"
    assert ("cannot run" in page.verdict(result, found)) is any(f.level == "stop" for f in found)


def test_without_gpus_it_is_said() -> None:
    result = good()
    result["groups"][0]["gpus"] = 0
    for one in result["pods"]:
        one.update(gpus=0, cuda={})
    result["plan"]["workers_gpus"] = 0
    assert [f.what for f in judge(result) if f.area == "gpus"] == [
        "The groups ask for no GPUs: training is on CPUs, and there is nothing to check."]


def test_bandwidth_that_training_can_count_on() -> None:
    result = good()
    assert check.measured_gbps(result["network"], result["collectives"]) == 85.0
    assert check.measured_gbps(result["network"], [{"nodes": 1, "backend": "nccl", "gbps": 2000.0}]) == 92.0
    assert check.measured_gbps([], []) == 0.0


# --- the page


class Page(HTMLParser):
    """Checks that tags are closed, and collects what would be loaded or run."""

    void = {"meta", "br", "hr", "link", "img", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[tuple[str, str]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [(tag, str(v)) for k, v in attrs if k in ("src", "href", "action") or k.startswith("on")]
        if tag == "script":
            self.loads.append((tag, ""))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone() -> None:
    text = page.html(good(), judge(good()))
    assert Page(text).loads == [] and "92.0" in text and "can run in dev" in text


def test_names_from_the_cluster_are_text() -> None:
    result = json.loads(json.dumps(good()).replace('"n1"', '"<img src=x onerror=alert(1)>"'))
    assert Page(page.html(result, judge(result))).loads == []


def test_the_picture() -> None:
    names, values = page.matrix(good(), "gbps")
    assert (names, values) == (["n1", "n2"], [[None, 92.0], [92.0, None]])
    values[1][0] = 9.2
    drawn = ElementTree.fromstring(page.picture(names, values, "Gbit/s", "TCP bandwidth"))
    opacity = [float(r.attrib["fill-opacity"]) for r in drawn.iter("{http://www.w3.org/2000/svg}rect") if "fill-opacity" in r.attrib]
    assert opacity[0] == pytest.approx(0.9) and opacity[1] == pytest.approx(0.12 + 0.078, abs=0.01)


def test_the_text() -> None:
    text = page.text(good(), judge(good()))
    assert "Gbit/s, from (row) to" in text and text.endswith("llama can run in dev.")
    bad = spoilt("network.0.gbps", 9.0)
    assert "-> Cable" in page.text(bad, judge(bad)) and "1 warning." in page.text(bad, judge(bad))


def test_the_exit_code_is_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for result, code in ((good(), 0), (spoilt("plan.fits", False), 1)):
        monkeypatch.setattr(check, "run", lambda *_, of=result, **__: of)
        options = SimpleNamespace(environment="dev", context="", megabytes=1, seconds=1.0, wait=1.0, out=str(tmp_path))
        assert check.main(options) == code  # type: ignore[arg-type]
        assert json.loads((tmp_path / "site-check.json").read_text())["verdict"] in capsys.readouterr().out
        assert (tmp_path / "site-check.html").read_text().startswith("<!doctype html>")


def test_nothing_runs_and_it_is_said() -> None:
    result = good()
    for one in result["pods"]:
        one.update(running=False, why="Back-off pulling image", facts={}, storage={}, cuda={})
    result.update(network=[], storage={}, collectives=[], plan={})
    found = judge(result)
    assert [f for f in found if f.level == "stop"] == [Finding(
        "stop", "nodes", f"No pod of the trainer image runs on {n}: Back-off pulling image",
        "Name an image that the node can pull: global.images.trainer, global.imagePullSecrets.") for n in ("n1", "n2")]
    Page(page.html(result, found))
