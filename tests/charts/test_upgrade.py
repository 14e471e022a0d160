"""From the previous chart to this one, by what both render: nothing that Kubernetes refuses to change, nothing lost that holds data."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.conftest import LOADER, NAMESPACE, RELEASE, SITES, Manifest, Values, helm, join, render
from tools import charts, environments

(PREVIOUS,) = (Path(__file__).parent / "previous").glob("llm-finetune-*.tgz")
IMMUTABLE: dict[str, tuple[str, ...]] = {
    "Deployment": ("selector",), "DaemonSet": ("selector",), "StatefulSet": ("selector", "serviceName", "volumeClaimTemplates"),
    "Service": ("clusterIP",), "PersistentVolume": ("nfs", "csi", "hostPath", "local", "nodeAffinity", "volumeMode", "storageClassName"),
    "PersistentVolumeClaim": ("accessModes", "storageClassName", "volumeName", "volumeMode", "selector"), "Job": ("selector", "template")}
"""Fields of `spec` that the API server lets nobody change."""
WHOLE: dict[str, tuple[str, ...]] = {"RoleBinding": ("roleRef",), "RuntimeClass": ("handler",),
                                     "StorageClass": ("provisioner", "parameters", "reclaimPolicy", "volumeBindingMode")}
HOLDS_DATA = {"PersistentVolume", "PersistentVolumeClaim", "StorageClass", "RayJob"}
DESCRIBED = (*environments.names(), *environments.examples())
PLACES: dict[str, Values] = {**SITES, **{name: environments.load(name).values for name in DESCRIBED}}


@cache
def previous(values: str) -> list[Manifest]:
    """What the previous chart renders; values that it does not know yet change nothing there."""
    command = [charts.helm(), "template", "--skip-schema-validation", RELEASE, str(PREVIOUS), "--namespace", NAMESPACE, "--values", "-"]
    done = subprocess.run(command, input=values, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.load_all(done.stdout, LOADER) if document]


def keyed(manifests: list[Manifest]) -> dict[tuple[str, str, str], Manifest]:
    return {(m["kind"], m["metadata"].get("namespace", ""), m["metadata"]["name"]): m for m in manifests}


@pytest.mark.parametrize("place", PLACES)
def test_nothing_immutable_changes_and_no_data_is_left_behind(place: str) -> None:
    before, after = (keyed(found) for found in (previous(json.dumps(PLACES[place])), render(PLACES[place])))
    assert len(before.keys() & after.keys()) >= 2
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        assert old["apiVersion"] == new["apiVersion"], key
        for field in IMMUTABLE.get(key[0], ()):
            assert old["spec"].get(field) == new["spec"].get(field), (*key, field)
        for field in WHOLE.get(key[0], ()):
            assert old.get(field) == new.get(field), (*key, field)
    gone = [key for key in before.keys() - after.keys() if key[0] in HOLDS_DATA]
    assert not gone


def test_the_comparison_finds_a_changed_selector() -> None:
    before, after = keyed(previous("{}")), keyed(render({}))
    key = next(k for k in before if k[0] == "Deployment")
    assert before[key]["spec"]["selector"] == after[key]["spec"]["selector"]
    assert before[key]["spec"]["selector"] != {**after[key]["spec"]["selector"], "matchLabels": {"a": "b"}}


def test_every_value_of_before_is_still_one() -> None:
    """Values that a site has set may not become unknown without a word; defaults of before are all set at once here."""
    done = subprocess.run([charts.helm(), "show", "values", str(PREVIOUS)], capture_output=True, text=True, check=True)
    old: dict[str, Any] = yaml.safe_load(done.stdout)
    with_parts = join(old, *({part: part_values(part)} for part in old if part != "global"))
    code, _, err = helm(with_parts)
    assert code == 0, err


def part_values(part: str) -> dict[str, Any]:
    """Default values of a part of the previous chart."""
    import tarfile

    with tarfile.open(PREVIOUS) as tar:
        file = tar.extractfile(f"llm-finetune/charts/{part}/values.yaml")
        assert file
        own = dict(yaml.safe_load(file.read()))
    own.pop("enabled")  # the umbrella's word
    return own
