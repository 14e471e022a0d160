"""What the scanners look at: every object of SITES, of the environments and of the worked examples, once each.

Scanners know pods and what Kubernetes makes pods from, and pass KubeRay's objects by. So each pod template of a RayCluster or RayJob is
written as the Pod that KubeRay makes of it, beside the object itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from tests.charts.conftest import Manifest, pod_templates
from tests.charts.test_objects import all_manifests


def pods_of(manifest: Manifest) -> list[Manifest]:
    """The Pods that KubeRay would make of a RayCluster or RayJob."""
    made = []
    for place, template in pod_templates(manifest):
        name = f"{manifest['metadata']['name']}-{place.replace('worker group ', '')}"
        labels = dict(template["metadata"]["labels"])
        if place != "submitter":
            labels |= {"ray.io/is-ray-node": "yes", "ray.io/cluster": manifest["metadata"]["name"],
                       "ray.io/node-type": "head" if place == "head" else "worker", "app.kubernetes.io/name": "kuberay"}
        spec = {"restartPolicy": "Never" if place == "submitter" else "Always", **template["spec"]}
        made.append({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": manifest["metadata"]["namespace"],
                                                                     "labels": labels}, "spec": spec})
    return made


def by_site() -> dict[str, list[Manifest]]:
    """All objects of each site."""
    found: dict[str, list[Manifest]] = {}
    for site, manifest in all_manifests():
        found.setdefault(site, []).extend([manifest, *(pods_of(manifest) if manifest["kind"] in ("RayCluster", "RayJob") else [])])
    return found


def scanned() -> dict[str, Manifest]:
    """File name: object; what several sites have alike is there once."""
    found: dict[str, Manifest] = {}
    seen: set[str] = set()
    for site, objects in by_site().items():
        for one in objects:
            text = json.dumps(one, sort_keys=True)
            if text not in seen:
                seen.add(text)
                metadata = one["metadata"]
                name = "-".join([site, one["kind"], metadata.get("namespace", ""), metadata["name"]])
                found[re.sub(r"[ /]", "-", name.lower()) + ".yaml"] = one
    return found


def write(folder: Path) -> dict[str, Manifest]:
    """Write them into a folder, one a file; returns what is where."""
    found = scanned()
    for name, manifest in found.items():
        (folder / name).write_text(yaml.safe_dump(manifest, sort_keys=False), encoding="utf-8")
    return found


def place(manifest: dict[str, Any]) -> str:
    """Kind and name as exceptions give them: `Deployment chatbot`, without the release's name and a run's hash."""
    name = manifest["metadata"]["name"]
    return f"{manifest['kind']} {name.removeprefix('site-').removeprefix('llm-finetune-')}"


