"""Git is the only handle: what is edited in the cluster comes back, what does not render changes nothing and says why."""

from __future__ import annotations

import subprocess
import time

import pytest
from kubernetes import client, dynamic

from tools.cluster import status

CHATBOT = "llm-finetune-chatbot"
LABEL = ("labels", "app.kubernetes.io/managed-by")
GENERATED = ("annotations", "controller-gen.kubebuilder.io/version")
"""Of the operator's CRDs, which have no labels."""
HEAL = 60
"""Seconds within which an edit of a live object is taken back."""


def settled(environment, wait_for) -> None:
    """Argo CD has everything as git says, and all of it is well."""
    wait_for(lambda: (s := environment()).sync == "Synced" and s.health == "Healthy" and not s.message, 180, "Synced and Healthy")


def pods(api: client.ApiClient, namespace: str) -> dict[str, str]:
    return {p.metadata.name: p.metadata.uid for p in client.CoreV1Api(api).list_namespaced_pod(namespace).items}


@pytest.mark.parametrize(("file", "old", "new", "says"), [
    ("site.yaml", "chatbot:\n", "chatbot:\n  replicas: many\n", "replicas"),
    ("release.yaml", "version: 0.1.0", "version: 9.9.9", "9.9.9"),
], ids=["invalid values", "unknown chart version"])
def test_a_push_that_does_not_render_changes_nothing_and_says_why(file, old, new, says, checkout, push, environment, wait_for, api,
                                                                  namespace, settings, layout):
    settled(environment, wait_for)
    wait_for(lambda: status.served_run(settings) == status.newest_run(layout), 180, "the chatbot with the newest run")
    before, served = pods(api, namespace), status.served_run(settings)
    path = checkout / "environments/local" / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    push(checkout, "A mistake")
    wait_for(lambda: says in environment().message, 90, f"an error that names {says}")
    print(environment().message)
    assert status.served_run(settings) == served
    subprocess.check_call(["git", "-C", checkout, "revert", "--quiet", "--no-edit", "HEAD"])
    subprocess.check_call(["git", "-C", checkout, "push", "--quiet", "origin", "HEAD:main"])
    settled(environment, wait_for)
    assert pods(api, namespace) == before, "nothing was restarted"


def test_edits_of_every_managed_object_are_taken_back(environment, wait_for, api):
    """Whatever kind it is: what git says of an object holds, within a minute, for all of them edited at once."""
    settled(environment, wait_for)
    kinds = dynamic.DynamicClient(api)
    application = client.CustomObjectsApi(api).get_namespaced_custom_object(*status.ARGO, "llm-finetune-local")
    objects = [(kinds.resources.get(api_version="/".join(filter(None, (r.get("group"), r["version"]))), kind=r["kind"]),
                {"name": r["name"], "namespace": r.get("namespace")}, GENERATED if r["kind"] == "CustomResourceDefinition" else LABEL)
               for r in application["status"]["resources"] if r["status"] == "Synced"]  # not the runs before, which git no longer names

    def said() -> list[str]:
        return [kind.get(**of).metadata[part][key] for kind, of, (part, key) in objects]

    before = said()
    for kind, of, (part, key) in objects:
        kind.patch(**of, body={"metadata": {part: {key: "somebody"}}}, content_type="application/merge-patch+json")
    begin = time.monotonic()
    wait_for(lambda: said() == before, HEAL, f"{len(objects)} objects as git says")
    edited = {kind.kind for kind, _, _ in objects}
    print(f"{len(objects)} objects of {len(edited)} kinds: back after {time.monotonic() - begin:.0f} s")
    assert edited >= {"Deployment", "ConfigMap", "Service", "RayCluster", "RayJob", "NetworkPolicy", "CustomResourceDefinition",
                      "PersistentVolumeClaim"}
    settled(environment, wait_for)


def test_live_edits_are_taken_back(environment, wait_for, api, namespace):
    settled(environment, wait_for)
    apps, core, custom = client.AppsV1Api(api), client.CoreV1Api(api), client.CustomObjectsApi(api)
    cluster = (*status.RAY, namespace, "rayclusters", "llm-finetune")

    def groups() -> list[dict]:
        return custom.get_namespaced_custom_object(*cluster)["spec"]["workerGroupSpecs"]

    config = core.read_namespaced_config_map(CHATBOT, namespace).data["chatbot.yaml"]
    wanted, replicas = groups(), apps.read_namespaced_deployment(CHATBOT, namespace).spec.replicas
    edits = {
        "Deployment": (lambda: apps.patch_namespaced_deployment(CHATBOT, namespace, {"spec": {"replicas": replicas + 1}}),
                       lambda: apps.read_namespaced_deployment(CHATBOT, namespace).spec.replicas == replicas),
        "ConfigMap": (lambda: core.patch_namespaced_config_map(CHATBOT, namespace, {"data": {"chatbot.yaml": "serve: {follow: none}"}}),
                      lambda: core.read_namespaced_config_map(CHATBOT, namespace).data["chatbot.yaml"] == config),
        "RayCluster": (lambda: custom.patch_namespaced_custom_object(*cluster, {"spec": {"workerGroupSpecs": [
                           {**wanted[0], "replicas": wanted[0]["replicas"] + 1}, *wanted[1:]]}}),
                       lambda: groups()[0]["replicas"] == wanted[0]["replicas"]),
    }
    for kind, (edit, is_back) in edits.items():
        edit()
        assert not is_back(), "the edit itself was accepted"
        begin = time.monotonic()
        wait_for(is_back, HEAL, f"the {kind} as git says")
        print(f"{kind}: back after {time.monotonic() - begin:.0f} s")
    settled(environment, wait_for)


def test_a_deleted_deployment_comes_back(environment, wait_for, api, namespace, settings):
    settled(environment, wait_for)
    apps = client.AppsV1Api(api)

    def found() -> list[str]:
        return [d.metadata.uid for d in apps.list_namespaced_deployment(namespace).items if d.metadata.name == CHATBOT]

    before = found()
    apps.delete_namespaced_deployment(CHATBOT, namespace)
    begin = time.monotonic()
    wait_for(lambda: found() and found() != before, HEAL, "the Deployment")
    print(f"Deployment: there again after {time.monotonic() - begin:.0f} s")
    wait_for(lambda: status.served_run(settings), 180, "the chatbot's model")
    settled(environment, wait_for)
