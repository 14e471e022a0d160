"""What `make status` says about objects and pods that are not well."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from kubernetes import client

from tools.cluster import status


def pod(**state: Any) -> client.V1Pod:
    container = client.V1ContainerStatus(name="chatbot", image="i", image_id="i", ready=False, restart_count=0,
                                         state=client.V1ContainerState(waiting=client.V1ContainerStateWaiting(**state)))
    return client.V1Pod(metadata=client.V1ObjectMeta(name="p", namespace="n", uid="u"),
                        status=client.V1PodStatus(container_statuses=[container]))


class Events:
    """The one question that is asked of the API."""

    def __init__(self, *messages: str) -> None:
        self.messages = messages

    def list_namespaced_event(self, namespace: str, field_selector: str) -> client.CoreV1EventList:
        assert (namespace, field_selector) == ("n", "involvedObject.uid=u,type=Warning")
        about = client.V1ObjectReference(uid="u")
        return client.CoreV1EventList(items=[
            client.CoreV1Event(metadata=client.V1ObjectMeta(name=str(i), creation_timestamp=datetime(2026, 1, 1, 0, i, tzinfo=UTC)),
                               involved_object=about, message=text) for i, text in enumerate(self.messages)])


@pytest.mark.parametrize(("waiting", "events", "says"), [
    ({"reason": "CreateContainerConfigError", "message": 'secret "token" not found'}, (), 'secret "token" not found'),
    ({"reason": "ContainerCreating"}, ("old", 'MountVolume.SetUp failed: secret "users" not found'), "users"),
    ({"reason": "ContainerCreating"}, (), ""),
])
def test_why_a_pod_is_not_ready(waiting: dict[str, str], events: tuple[str, ...], says: str) -> None:
    found = status.trouble(Events(*events), pod(**waiting))  # type: ignore[arg-type]
    assert says in found and bool(found) == bool(says)


def test_objects_that_are_not_healthy() -> None:
    assert status.unhealthy([
        {"kind": "Service", "name": "chatbot", "health": {"status": "Healthy"}}, {"kind": "ConfigMap", "name": "chatbot"},
        {"kind": "Deployment", "name": "chatbot", "health": {"status": "Progressing", "message": "Waiting for rollout"}},
        {"kind": "RayJob", "name": "run", "health": {"status": "Degraded"}},
    ]) == ("Deployment chatbot: Progressing, Waiting for rollout", "RayJob run: Degraded")
