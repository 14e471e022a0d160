"""Golden renders: what every environment makes of the charts, checked in, so that a change of either shows in a review.

Write them anew after an intended change:

    python -m tests.tools.test_golden
"""

from __future__ import annotations

import difflib
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tools import argocd, environments
from tools.diff import key_of, render
from tools.layout import REPOSITORY

GOLDEN = Path(__file__).parent / "golden"
IMAGES = {name: {"repository": f"registry.local/{name.lower()}", "digest": "sha256:" + digit * 64}
          for name, digit in (("trainer", "1"), ("chatbot", "2"), ("kuberayOperator", "3"))}
"""Stands in for the annotation of a cluster that builds its images on the spot."""


def golden(name: str) -> str:
    """The environment's objects as text, sorted by kind, namespace and name."""
    objects = render(name, images=IMAGES)
    return "---\n".join(yaml.safe_dump(objects[key], sort_keys=True, width=140) for key in sorted(objects))


@pytest.mark.parametrize("name", environments.names())
def test_golden(name: str) -> None:
    path = GOLDEN / f"{name}.yaml"
    expected = path.read_text(encoding="utf-8") if path.exists() else ""
    found = golden(name)
    lines = difflib.unified_diff(expected.splitlines(), found.splitlines(), str(path.relative_to(REPOSITORY)), "rendered", lineterm="", n=1)
    assert expected == found, "\n".join(["Rendered otherwise; if that is meant: python -m tests.tools.test_golden", *list(lines)[:60]])


def test_a_promoted_environment_serves_exactly_the_promoted_weights(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "environments", tmp_path / "environments")
    release = tmp_path / "environments/staging/release.yaml"
    serve = {"follow": "none", "run": "llama31-8b-pubmedqa-0123456789", "sha256": "5" * 64}
    value = yaml.safe_load(release.read_text(encoding="utf-8")) | {"chatbot": {"enabled": True, "config": {"serve": serve}}}
    release.write_text(yaml.safe_dump(value), encoding="utf-8")
    objects = render("staging", tmp_path, chart=REPOSITORY / environments.CHART)
    (config,) = [m for k, m in objects.items() if k[0] == "ConfigMap"]
    (text,) = config["data"].values()
    assert yaml.safe_load(text)["serve"] == serve
    (chatbot,) = [m["spec"]["template"]["spec"] for k, m in objects.items() if k[0] == "Deployment"]
    assert chatbot["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert chatbot["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert not [k for k in objects if k[0] in ("RayJob", "RayCluster")], "nothing is trained there"
    # Named twice, once read-only, a claim is mounted read-only or not as it happens: the kubelet keeps one kind for both.
    claims = [v["persistentVolumeClaim"] for v in chatbot["volumes"] if "persistentVolumeClaim" in v]
    assert len(claims) == 1 and "readOnly" not in claims[0]
    mounts = {m["mountPath"]: m.get("readOnly", False) for m in chatbot["containers"][0]["volumeMounts"] if m["name"] == "storage"}
    assert mounts.pop("/storage") and not any(mounts.values())


@pytest.mark.parametrize("name", environments.names())
def test_argo_cd_and_helm_make_the_same_objects(name: str, tmp_path: Path) -> None:
    """The ApplicationSet's order of values (files, then `values`) against the printed Helm command: the same objects."""
    application = argocd.read_manifests(argocd.ARGOCD / "applicationset.yaml")[0]["spec"]["template"]["spec"]["sources"][1]["helm"]
    files = [f.replace("$values", str(REPOSITORY)).replace("{{ .path.basename }}", name) for f in application["valueFiles"]]
    pinned = "images" in environments.load(name).documents["release.yaml"].value["global"]
    place = tmp_path / "values.yaml"
    place.write_text("{}" if pinned else yaml.safe_dump({"global": {"images": IMAGES}}), encoding="utf-8")
    # As Argo CD's repo-server calls Helm (util/helm/cmd.go of 3.2): name template, namespace, value files, then values. Test hooks are
    # rendered there, but never applied (gitops-engine, pkg/sync/ignore).
    command = [environments.helm_binary(), "template", "--skip-tests", str(REPOSITORY / environments.CHART),
               "--name-template", application["releaseName"], "--namespace",
               environments.namespace(name), *[a for f in files for a in ("--values", f)], "--values", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ours = {key_of(m): m for m in yaml.safe_load_all(done.stdout) if m}
    printed = render(name, images=IMAGES)
    assert ours.keys() == printed.keys()
    for key, manifest in yaml_equal(printed).items():
        assert yaml_equal(ours)[key] == manifest, key


def yaml_equal(objects: dict) -> dict:
    """Objects through one YAML writer and reader, so that number types don't matter."""
    return {key: yaml.safe_dump(value, sort_keys=True) for key, value in objects.items()}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for environment in environments.names():
        (GOLDEN / f"{environment}.yaml").write_text(golden(environment), encoding="utf-8")
        print(f"wrote {(GOLDEN / f'{environment}.yaml').relative_to(REPOSITORY)}")
