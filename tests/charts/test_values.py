"""Every value changes a manifest, or it is said here why not; the schemas belong to the values files."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.charts.conftest import SITES, Values, helm, join
from tools import charts, values_page
from tools.errors import OperatorError

Path_ = tuple[str, ...]

NO_MANIFEST: dict[str, str] = {
    "global.nodes": "only refuses (test_refusals: node path on two nodes)",
    "global.release.chart.version": "only refuses (test_refusals: values of another chart)",
    "global.gpu.available": "only refuses (test_refusals: ... without a GPU site)",
    "global.podSecurity.level": "only refuses (test_refusals: ... under restricted)",
    "finetune-job.enabled": "the umbrella's condition (test_conditions)",
    "chatbot.config.serve.follow": "copied like sha256, and checked against serve.run (test_refusals)",
    "chatbot.config.serve.sha256": "goes into the chatbot's file with the rest of config, which is copied whole (test_chatbot)",
}
"""Values without a manifest of their own, with the reason."""

CHANGED: dict[str, Any] = {
    "global.release.chart.version": "0.1.0",
    "global.images.*.digest": "sha256:" + "b" * 64,
    "global.imagePullSecrets": ["other"],
    "global.storage.mountPath": "/elsewhere",
    "global.rayCluster.version": "2.61.0",
    "global.gpu.resourceName": "example.com/gpu",
    "global.networkPolicy.*": ["10.9.0.0/16"],
    "global.networkPolicy.enabled": False,
    "global.networkPolicy.monitoringNamespace": "observability",
    "global.monitoring.labels": {"release": "prometheus"},
    "global.monitoring.dashboardLabels.grafana_dashboard": "yes",
    "*.nodeSelector": {"disk": "fast"},
    "*.tolerations": [{"key": "x", "operator": "Exists"}],
    "*.resources": {"requests": {"cpu": "77m", "memory": "77Mi"}, "limits": {"memory": "1Gi"}},
    "*.env": [{"name": "X", "value": "y"}],
    "*.volumes": [{"name": "more", "emptyDir": {}}],
    "*.volumeMounts": [{"name": "storage", "mountPath": "/more"}],
    "*.labels": {"colour": "red"},
    "*.extraEgress": [{"ports": [{"port": 8080}]}],
    "finetune-job.run": {"name": "another", "model": {"path": "models/base"}, "data": {"sample": True}},
    "finetune-job.resources": {"max_failures": 3},
    "finetune-job.env": {"X": "y"},
    "finetune-job.retention.schedule": "1 1 * * 1",
    "nfs-provisioner.mountOptions": ["hard", "nfsvers=4.2"],
    "nfs-provisioner.capacity": "2Ti",
    "nfs-provisioner.external.driverVersion": "4.14.0",
    "nfs-provisioner.*.path": "/other",
    "nfs-provisioner.inCluster.hostPath": "/other",
    "nfs-provisioner.inCluster.clusterIP": "10.96.0.51",
    "nfs-provisioner.inCluster.clients": ["10.2.0.0/24"],
    "kuberay-operator.watchNamespaces": ["elsewhere"],
    "kuberay-operator.featureGates": {"AsyncJobInfoQuery": True},
    "ray-cluster.head.dashboard.nodePort": 30001,
    "ray-cluster.*emory": "9Gi",
    "ray-cluster.*emoryRequest": "3Gi",
    "ray-cluster.*objectStoreMemory": "300Mi",
    "ray-cluster.workerDefaults.shmSize": "3Gi",
    "ray-cluster.workerDefaults.minReplicas": 0,
    "ray-cluster.workerDefaults.maxReplicas": 9,
    "ray-cluster.workerDefaults.scratch.sizeLimit": "9Gi",
    "ray-cluster.workerDefaults.scratch.*ath": "/other",
    "ray-cluster.workerGroups": [{"name": "other"}],
    "ray-cluster.secretEnv": [{"name": "X", "secretName": "s", "key": "k"}],
    "ray-cluster.hubCache": "elsewhere",
    "ray-cluster.networkPolicy.dashboardClients": ["10.9.0.0/16"],
    "ray-cluster.workerDefaults.network.rdma.resourceName": "rdma/other",
    "chatbot.secrets": [{"secretName": "more", "mountPath": "/more"}],
    "chatbot.vllm.enabled": False,
    "chatbot.vllm.shmSize": "9Gi",
    "chatbot.vllm.extraArgs": ["--enable-prefix-caching"],
    "chatbot.service.nodePort": 30001,
    "chatbot.ingress.annotations": {"c": "d"},
    "chatbot.networkPolicy.ingressNamespaces": ["traefik"],
    "chatbot.config.serve.run": "other-0000000000",
    "nfs-provisioner.mode": "existingClaim",
    "ray-cluster.workerDefaults.scratch.kind": "none",
    "nvidia-device-plugin.driverRoot": "/run/nvidia/driver",
}
"""Other values, by path (a `*` stands for any text); the last that fits is taken. What is not here is derived from the default."""

EXTRA_SITES: dict[str, Values] = {
    "workers by default": {"ray-cluster": {"workerGroups": [{"name": "a"}], "waitForHead": False}},
    "privileged workers": {"global": {"podSecurity": {"level": "privileged"}, "gpu": {"available": True}},
                           "ray-cluster": {"workerDefaults": {"scratch": {"kind": "hostPath", "hostPath": "/nvme"},
                                                              "network": {"rdma": {"resourceName": "rdma/hca"}}, "maxReplicas": 3}}},
    "autoscaling": {"ray-cluster": {"autoscaling": {"enabled": True}, "workerDefaults": {"minReplicas": 0, "maxReplicas": 3}}},
    "time slicing": {"global": {"gpu": {"available": True, "resourceName": "nvidia.com/gpu.shared"},
                                "podSecurity": {"level": "privileged"}},
                     "nvidia-device-plugin": {"enabled": True, "sharing": {"kind": "timeSlicing"}}},
    "chatbot on a GPU": {"global": {"gpu": {"available": True}},
                         "chatbot": {"enabled": True, "config": {"serve": {"follow": "latest"}}, "ingress": {"host": "chat.example.org"}}},
}


def leaves(node: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """(path, default) of every value: a mapping with defaults is gone through, an empty one or a list is one value."""
    whole = {("finetune-job", "run"), ("finetune-job", "resources")}
    if isinstance(node, dict) and node and path not in whole and path[-1:] != ("resources",):
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, node


def all_values() -> list[tuple[Path_, Any]]:
    """Values of the umbrella and of every part, each below its part's name."""
    found = []
    for file in charts.values_files():
        top = () if file.parent == charts.CHART else (file.parent.name,)
        found += [(path, default) for path, default in leaves(yaml.safe_load(file.read_text()), top) if top or path[0] == "global"]
    return found


def other(path: Path_, default: Any) -> Any:
    """A value beside the default."""
    name = ".".join(path)
    fitting = [value for pattern, value in CHANGED.items() if fnmatchcase(name, pattern)]
    if fitting:
        return fitting[-1]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, str):
        schema = schema_at(path)
        return next((choice for choice in reversed(schema.get("enum", [])) if choice != default), f"{default or 'x'}1")
    raise AssertionError(f"{name} needs an entry in CHANGED")


def schema_at(path: Path_) -> dict[str, Any]:
    top = charts.CHART if path[0] == "global" else charts.CHART / "charts" / path[0]
    schema = json.loads((top / "values.schema.json").read_text())
    for key in path if path[0] == "global" else path[1:]:
        schema = schema["properties"][key]
    return schema


def with_value(site: Values, path: Path_, value: Any) -> Values:
    values = copy.deepcopy(site)
    node = values
    for key in path[:-1]:
        node = node.setdefault(key, {})
    node[path[-1]] = value
    return values


def likely(path: Path_) -> list[Values]:
    """Sites, those that say most about the value's part first (helm takes its time for each)."""
    sites = [*SITES.values(), *EXTRA_SITES.values()]
    return sorted(sites, key=lambda site: -len(json.dumps(site.get(path[0], {}))))


CONDITIONS = {("chatbot", "enabled"), ("ray-cluster", "enabled"), ("kuberay-operator", "enabled"), ("nfs-provisioner", "enabled"),
              ("nvidia-device-plugin", "enabled"), ("finetune-job", "enabled")}
"""Tested by test_conditions."""


@pytest.mark.parametrize(("path", "default"), [v for v in all_values() if v[0] not in CONDITIONS],
                         ids=[".".join(v[0]) for v in all_values() if v[0] not in CONDITIONS])
def test_every_value_is_used(path: Path_, default: Any) -> None:
    name = ".".join(path)
    if name in NO_MANIFEST:
        assert len(NO_MANIFEST[name]) > 10
        return
    value, messages = other(path, default), []
    for site in likely(path):
        code, before, _ = helm(site)
        assert code == 0
        code, after, err = helm(with_value(site, path, value))
        if code != 0:
            messages.append(err.strip())
        elif after != before:
            return
    pytest.fail(f"{name}: {value!r} changes nothing in any site. {set(messages)}")


def test_exceptions_are_values() -> None:
    names = {".".join(path) for path, _ in all_values()}
    assert set(NO_MANIFEST) <= names


@pytest.mark.parametrize("part", ["nfs-provisioner", "nvidia-device-plugin", "kuberay-operator", "ray-cluster", "finetune-job", "chatbot"])
def test_conditions(part: str) -> None:
    """A part that is switched off leaves no object, and switching it on brings some."""
    site = join(SITES["mixed GPUs"])
    on = [d for d in yaml.safe_load_all(helm(site)[1]) if d]
    off = [d for d in yaml.safe_load_all(helm(join(site, {part: {"enabled": False}}))[1]) if d]

    def of(documents: list[Any]) -> list[Any]:
        return [d for d in documents if d["metadata"]["labels"]["app.kubernetes.io/name"] == part]

    assert of(on) and not of(off)
    assert len(off) == len(on) - len(of(on))


@pytest.mark.parametrize("values", charts.values_files(), ids=lambda p: p.parent.name)
def test_schema_belongs_to_values(values: Path) -> None:
    """`python -m tools.charts schema` writes it."""
    assert values.with_name("values.schema.json").read_text(encoding="utf-8") == charts.schema_text(values)


def test_the_page_belongs_to_the_values() -> None:
    """`python -m tools.values_page` writes it."""
    assert values_page.PAGE.read_text(encoding="utf-8") == values_page.page()


def test_the_page_names_every_value() -> None:
    named = set(re.findall(r"^\| \*{0,2}`([^`]+)`", values_page.page(), re.MULTILINE))
    for path, _ in all_values():  # a mapping of free keys, or one that is described elsewhere, is named as a whole
        assert any(".".join(path[:end]) in named for end in range(2, len(path) + 1)), path
    assert len(named) > 150


@pytest.mark.parametrize("values", charts.values_files(), ids=lambda p: p.parent.name)
def test_schema_is_closed_and_described(values: Path) -> None:
    schema = json.loads(values.with_name("values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    assert schema["$schema"] == charts.DRAFT

    def walk(node: dict[str, Any], where: str) -> None:
        if "properties" in node and not where.endswith("]"):
            assert "additionalProperties" in node, where
        for key, child in node.get("properties", {}).items():
            if where.split(".")[0:2] not in (["", "config"],):  # the chatbot describes its own
                assert child.get("description"), f"{where}.{key}"
            walk(child, f"{where}.{key}")

    walk(schema, "")


def test_the_trainers_schema_is_embedded() -> None:
    from trainer import schema as trainer_schema
    properties = json.loads((charts.CHART / "charts/finetune-job/values.schema.json").read_text())["properties"]
    made = trainer_schema.make()["properties"]
    assert properties["run"]["else"] == {"type": "object", **made["run"]}
    embedded, fresh = ({k: v for k, v in schema.items() if k != "description"} for schema in (properties["resources"], made["resources"]))
    assert embedded == fresh


def test_an_undescribed_value_is_refused(tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text("# Fine.\na: 1\nb: 2\n")
    with pytest.raises(OperatorError, match="b has no comment"):
        charts.schema_of(tmp_path / "values.yaml")


def test_an_open_value_is_refused(tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text("# What?\na: {}\n")
    with pytest.raises(OperatorError, match="a is an empty mapping"):
        charts.schema_of(tmp_path / "values.yaml")
