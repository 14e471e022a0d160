"""CRDs from KubeRay's module, the package and what is in it."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest
import yaml

from tools import charts
from tools.errors import OperatorError


def test_versions_belong_together() -> None:
    umbrella = yaml.safe_load((charts.CHART / "Chart.yaml").read_text())
    parts = {path.parent.name: yaml.safe_load(path.read_text()) for path in charts.CHART.glob("charts/*/Chart.yaml")}
    assert {d["name"]: d["version"] for d in umbrella["dependencies"]} == {name: part["version"] for name, part in parts.items()}
    assert all(d["condition"] == f"{d['name']}.enabled" for d in umbrella["dependencies"])
    images = yaml.safe_load((charts.CHART / "values.yaml").read_text())["global"]["images"]
    assert images["kuberayOperator"]["tag"] == f"v{charts.kuberay_version()}"
    assert images["nvidiaDevicePlugin"]["tag"] == f"v{parts['nvidia-device-plugin']['appVersion']}"


def test_the_operator_is_built_from_the_same_version() -> None:
    text = (charts.REPOSITORY / "tools/cluster/sources/kuberay/go.mod").read_text()
    found = re.search(rf"{re.escape(charts.KUBERAY_MODULE)} v(\S+)", text)
    assert found and found[1] == charts.kuberay_version()


def test_ray_is_the_one_of_the_trainer() -> None:
    version = yaml.safe_load((charts.CHART / "values.yaml").read_text())["global"]["rayCluster"]["version"]
    lock = (charts.REPOSITORY / "trainer/uv.lock").read_text()
    found = re.search(r'name = "ray"\nversion = "([^"]+)"', lock)
    assert found and found[1] == version == yaml.safe_load((charts.CHART / "charts/ray-cluster/Chart.yaml").read_text())["appVersion"]


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the chart's sources, in which packaging may work."""
    import shutil
    target = tmp_path / "llm-finetune"
    shutil.copytree(charts.CHART, target, ignore=shutil.ignore_patterns("crds", "*.tgz"))
    monkeypatch.setattr(charts, "CHART", target)
    monkeypatch.setattr(charts, "OPERATOR", target / "charts" / "kuberay-operator")
    return target


def test_package(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="make charts"):
        charts.package("0.1.0", tmp_path / "out")
    stale = copied / "charts/kuberay-operator/crds"
    stale.mkdir()
    (stale / "ray.io_old.yaml").write_text("x")
    crds = charts.copy_crds(charts.kuberay_module())
    assert sorted(p.name for p in stale.iterdir()) == sorted(p.name for p in crds) == sorted(charts.CRDS)
    for crd in crds:  # switching the operator off must not delete every run of the cluster
        annotations = yaml.safe_load(crd.read_text())["metadata"]["annotations"]
        assert annotations["argocd.argoproj.io/sync-options"] == "Prune=false"
    archive = charts.package("0.1.1-rc.1", tmp_path / "out")
    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
        member = tar.extractfile("llm-finetune/Chart.yaml")
        assert member and yaml.safe_load(member)["version"] == "0.1.1-rc.1"
    for part in ("values.schema.json", "charts/finetune-job/files/retention.py", "charts/kuberay-operator/crds/ray.io_rayjobs.yaml",
                 "templates/NOTES.txt", "charts/chatbot/values.schema.json"):
        assert f"llm-finetune/{part}" in names
    assert archive.stat().st_size < 900_000, "Helm keeps the chart in a Secret, which holds at most 1 MiB"


def test_package_refuses_a_version_that_is_none(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="semantic version"):
        charts.package("latest", tmp_path)


def test_crds_of_another_version_are_refused(copied: Path, tmp_path: Path) -> None:
    other = tmp_path / "ray-operator@v1.0.0"
    other.mkdir()
    with pytest.raises(OperatorError, match=r"is not github\.com/ray-project/kuberay"):
        charts.copy_crds(other)


def test_helm_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "helm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("HELM", str(program))
    assert charts.helm() == str(program)
    monkeypatch.delenv("HELM")
    monkeypatch.setenv("LLM_FINETUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert charts.helm() == str(program)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(OperatorError, match="helm was not found"):
        charts.helm()


def test_a_failed_push_says_why(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="helm push"):
        charts.push("127.0.0.1:1/charts", tmp_path / "none.tgz")
