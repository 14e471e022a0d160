"""kubeconform (strict), kube-score and checkov over everything that the chart renders: no finding without an answer (`make scan`).

A finding is mended in the chart, or argued in exceptions.yaml; an exception that no finding needs any more fails too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.charts.test_objects import LOADER, crd
from tests.scan import manifests
from tools import shell
from tools.cluster.sources import Source, build, go_binary
from tools.cluster.sources import environment as go_environment
from tools.layout import Layout

HERE = Path(__file__).parent
DOCUMENT: dict[str, Any] = yaml.safe_load((HERE / "exceptions.yaml").read_text(encoding="utf-8"))
KUBERNETES = ["1.33.0", "1.34.0", "1.35.0", "1.36.0", "1.37.0"]
PROMETHEUS_OPERATOR = "github.com/prometheus-operator/prometheus-operator@v0.85.0"
"""Has the CRD of PodMonitor."""


@dataclass(frozen=True)
class Finding:
    """One thing that a scanner holds against an object."""

    scanner: str
    check: str
    where: str
    text: str


@pytest.fixture(scope="module")
def programs() -> Path:
    """Folder of kubeconform and kube-score."""
    layout = Layout()
    build(Source("scanners", ("kubeconform", "kube-score"), 90), layout, lambda text: print(f"scanners: {text}", flush=True))
    return layout.bin


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rendered")


@pytest.fixture(scope="module")
def rendered(folder: Path) -> dict[str, manifests.Manifest]:
    found = manifests.write(folder)
    assert len(found) > 200 and {"Pod", "RayJob", "DaemonSet", "StatefulSet", "Ingress"} <= {m["kind"] for m in found.values()}
    return found


def unexplained(scanner: str, findings: list[Finding]) -> list[str]:
    """Findings that no exception names, and exceptions that no finding needs."""
    exceptions = [e for e in DOCUMENT["exceptions"] if e["scanner"] == scanner]
    told = [f"{f.check} {f.where}: {f.text}" for f in findings if not any(fits(e, f) for e in exceptions)]
    stale = [f"exceptions.yaml: {e['check']} for {where} is needed by nothing" for e in exceptions for where in e["where"]
             if not any(fits({**e, "where": [where]}, f) for f in findings)]
    return sorted(set(told + stale))


def fits(exception: dict[str, Any], finding: Finding) -> bool:
    return bool(exception["check"] == finding.check) and any(fnmatchcase(finding.where, pattern) for pattern in exception["where"])


def prometheus_operator() -> Path:
    answer = shell.output([go_binary(), "mod", "download", "-json", PROMETHEUS_OPERATOR], env=go_environment(Layout()), timeout=600)
    return Path(json.loads(answer)["Dir"])


@pytest.fixture(scope="module")
def crds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Closed schemas of the kinds that Kubernetes does not have, as kubeconform looks for them."""
    made = tmp_path_factory.mktemp("crds")
    for kind in ("RayCluster", "RayJob"):
        (made / f"{kind.lower()}-ray-v1.json").write_text(json.dumps(crd(kind)), encoding="utf-8")
    document = yaml.load((prometheus_operator() / "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml").read_text(
        encoding="utf-8"), LOADER)
    (version,) = [v for v in document["spec"]["versions"] if v["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["spec"]["additionalProperties"] = False
    (made / "podmonitor-monitoring-v1.json").write_text(json.dumps(schema), encoding="utf-8")
    return made


def kubernetes_schemas(version: str, manifests_: list[manifests.Manifest], target: Path) -> None:
    """Kubernetes' schemas of the kinds at hand. The package refers to its definitions by an address of its own."""
    source = Path(kubernetes_validate.__file__).parent / f"kubernetes-json-schema/v{version}-local-strict"
    names = {"_definitions.json"}
    for manifest in manifests_:
        group, _, api = manifest["apiVersion"].rpartition("/")
        names.add("-".join([manifest["kind"].lower(), *([group.split(".")[0]] if group else []), api]) + ".json")
    for name in names:
        if (source / name).is_file():  # the others are the CRDs'
            schema = json.loads((source / name).read_text(encoding="utf-8").replace("/api/_definitions.json", "_definitions.json"))
            schema.pop("$id")  # references are taken from the file's own place
            (target / name).write_text(json.dumps(schema), encoding="utf-8")


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubeconform(version: str, programs: Path, folder: Path, rendered: dict[str, Any], crds: Path, tmp_path: Path) -> None:
    kubernetes_schemas(version, list(rendered.values()), tmp_path)
    done = subprocess.run(
        [programs / "kubeconform", "-strict", "-output", "json", "-summary", "-kubernetes-version", version,
         "-schema-location", f"{tmp_path}/{{{{ .ResourceKind }}}}{{{{ .KindSuffix }}}}.json",
         "-schema-location", f"{crds}/{{{{ .ResourceKind }}}}{{{{ .KindSuffix }}}}.json", folder],
        capture_output=True, text=True, check=False)
    answer = json.loads(done.stdout)
    assert answer["summary"]["valid"] == len(rendered), [r for r in answer.get("resources") or [] if r["status"] != "statusValid"][:5]
    assert done.returncode == 0


def test_kubeconform_finds_an_unknown_field(programs: Path, crds: Path, tmp_path: Path, rendered: dict[str, Any]) -> None:
    wrong = yaml.safe_load(yaml.safe_dump(next(m for m in rendered.values() if m["kind"] == "PodMonitor")))
    wrong["spec"]["podMetricEndpoints"] = []
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong), encoding="utf-8")
    done = subprocess.run([programs / "kubeconform", "-strict", "-schema-location",
                           f"{crds}/{{{{ .ResourceKind }}}}{{{{ .KindSuffix }}}}.json", tmp_path / "wrong.yaml"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "podMetricEndpoints" in done.stdout


def kube_score(program: Path) -> Iterator[Finding]:
    """Site by site: kube-score looks at objects together (policies for pods, budgets for deployments)."""
    for objects in manifests.by_site().values():
        done = subprocess.run([program, "score", "-o", "json", "--kubernetes-version", "v1.33", "--enable-optional-test",
                               "container-security-context-privileged", "-"], input=yaml.safe_dump_all(objects), capture_output=True,
                              text=True, check=False)
        for scored in json.loads(done.stdout) or []:
            where = manifests.place({"kind": scored["type_meta"]["kind"], "metadata": scored["object_meta"]})
            for check in scored["checks"]:
                if not check["skipped"] and check["grade"] < 10:
                    for comment in check["comments"] or [{"summary": ""}]:
                        yield Finding("kube-score", check["check"]["id"], where, comment["summary"])


def test_kube_score(programs: Path) -> None:
    findings = list(kube_score(programs / "kube-score"))
    assert findings, "the exceptions are all that is left, and there are some"
    assert unexplained("kube-score", findings) == []


def test_checkov(folder: Path, rendered: dict[str, Any]) -> None:
    program = Layout().cache / "venv/checkov/bin/checkov"
    command = [program, "-d", folder, "--framework", "kubernetes", "--output", "json", "--compact", "--quiet", "--skip-download"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LOG_LEVEL": "ERROR"})
    answer = json.loads(done.stdout)
    assert answer["summary"]["checkov_version"] == DOCUMENT["versions"]["checkov"] and answer["summary"]["passed"] > 1000
    findings = [Finding("checkov", f["check_id"], manifests.place(rendered[Path(f["file_path"]).name]), f["check_name"])
                for f in answer["results"]["failed_checks"]]
    assert unexplained("checkov", findings) == []


def test_exceptions_say_why() -> None:
    for exception in DOCUMENT["exceptions"]:
        assert exception["where"] and len(exception["why"]) > 40, exception
    keys = [(e["scanner"], e["check"], where) for e in DOCUMENT["exceptions"] for where in e["where"]]
    assert len(set(keys)) == len(keys)


def test_the_versions_are_those_that_are_pinned() -> None:
    """exceptions.yaml says which version said what."""
    required = dict(re.findall(r"^\s*(?:require )?github.com/(?:zegl|yannh)/(\S+) v(\S+)",
                               (HERE.parents[1] / "tools/cluster/sources/scanners/go.mod").read_text(encoding="utf-8"), re.MULTILINE))
    pinned = re.search(r"checkov==([\d.]+)", (HERE / "checkov/pyproject.toml").read_text(encoding="utf-8"))
    assert pinned
    assert DOCUMENT["versions"] == {**required, "checkov": pinned[1]}
