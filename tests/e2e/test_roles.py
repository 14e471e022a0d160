"""What the chart's service accounts may do, by `kubectl auth can-i --list` on the cluster, held to tests/e2e/golden/roles.txt; and what
pods may, by the label that Argo CD puts on the namespace.

After an intended change: python -m tests.e2e.test_roles
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from tools import environments, shell
from tools.layout import Layout

GOLDEN = Path(__file__).parent / "golden/roles.txt"
NAMESPACE = environments.namespace("local")
ACCOUNTS = {"the operator": "llm-finetune-kuberay-operator", "Ray's pods, submitters, chatbot (without token)": "default"}
PLACES = {"in its namespace": NAMESPACE, "in kube-system": "kube-system"}


def may(account: str, namespace: str) -> list[str]:
    """Rows of `kubectl auth can-i --list`: resources, URLs, names, verbs."""
    layout = Layout()
    text = shell.output([layout.kubectl, "--kubeconfig", layout.kubeconfig, "auth", "can-i", "--list", "--namespace", namespace,
                         f"--as=system:serviceaccount:{NAMESPACE}:{account}", "--as-group=system:serviceaccounts",
                         f"--as-group=system:serviceaccounts:{NAMESPACE}", "--as-group=system:authenticated"])
    return sorted(" ".join(line.split()) for line in text.splitlines()[1:])


def roles() -> str:
    """The golden file's text."""
    parts = []
    for who, account in ACCOUNTS.items():
        for where, namespace in PLACES.items():
            parts += [f"# {who}, {where}", *may(account, namespace), ""]
    return "\n".join(parts)


def test_roles_are_as_small_as_they_were() -> None:
    assert roles() == GOLDEN.read_text(encoding="utf-8")


def test_nobody_may_do_everything() -> None:
    """No `*`, no right that leads to another's: escalate, bind, impersonate, tokens; Secrets are not changed."""
    for account in ACCOUNTS.values():
        for row in may(account, NAMESPACE):
            resource, verbs = row.split(" ")[0], row.rsplit("[", 1)[-1].rstrip("]").split()
            assert resource != "*.*" and not {"*", "escalate", "bind", "impersonate"} & set(verbs), row
            assert resource != "serviceaccounts/token" and not (resource == "secrets" and {"update", "patch", "delete"} & set(verbs)), row


def test_nothing_elsewhere() -> None:
    """In another namespace the operator may do what any account may, and no more."""
    anybody = may("nobody", "kube-system")
    for account in ACCOUNTS.values():
        assert may(account, "kube-system") == anybody


@pytest.mark.parametrize(("field", "value"), [("hostNetwork", True), ("securityContext", {"runAsUser": 0}),
                                              ("volumes", [{"name": "root", "hostPath": {"path": "/"}}])])
def test_pod_security_restricted_is_enforced(field: str, value: Any, api: client.ApiClient) -> None:
    """Not only warned of: the API server refuses a pod that asks for more, even one that an administrator makes."""
    core = client.CoreV1Api(api)
    namespace: Any = core.read_namespace(NAMESPACE)
    assert namespace.metadata.labels["pod-security.kubernetes.io/enforce"] == "restricted"
    context = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True,
               "seccompProfile": {"type": "RuntimeDefault"}}
    pod: dict[str, Any] = {"metadata": {"name": "try"}, "spec": {"containers": [{"name": "a", "image": "a", "securityContext": context}]}}
    core.create_namespaced_pod(NAMESPACE, pod, dry_run="All")
    pod["spec"][field] = value
    with pytest.raises(ApiException, match="violates PodSecurity"):
        core.create_namespaced_pod(NAMESPACE, pod, dry_run="All")


if __name__ == "__main__":
    GOLDEN.write_text(roles(), encoding="utf-8")
    print(f"wrote {GOLDEN.name}")
    sys.exit(0)
