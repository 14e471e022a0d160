"""End-to-end tests on the local cluster that `make up` has brought up. Without one they fail: `make test` starts it."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from tests import waiting
from tools.cluster import kubernetes, registry, status
from tools.cluster.settings import Settings
from tools.layout import Layout

ENVIRONMENT = "local"


@pytest.fixture(scope="session")
def layout() -> Layout:
    return Layout()


@pytest.fixture(scope="module")
def kube_config(layout: Layout) -> str:
    """For pytest-helm-charts' `kube_cluster`."""
    return str(layout.kubeconfig)


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings()


@pytest.fixture(scope="session")
def api(layout: Layout) -> client.ApiClient:
    return kubernetes.api_client(layout)


@pytest.fixture(scope="session")
def namespace() -> str:
    return status.namespace(ENVIRONMENT)


@pytest.fixture(scope="session")
def environment(api: client.ApiClient, layout: Layout) -> Callable[[], status.State]:
    """The local environment's state now."""
    return lambda: status.environment(api, ENVIRONMENT, layout)


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., Any]:
    """Poll a question until its answer is true; returns the answer."""
    return functools.partial(waiting.wait_for, every=1.0)


@contextlib.contextmanager
def cloned(repository: Path, folder: Path) -> Iterator[Path]:
    """A user's clone of the deployed repository. At the end, main is set back to where it was."""
    before = subprocess.check_output(["git", "-C", repository, "rev-parse", registry.BRANCH], text=True).strip()
    subprocess.check_call(["git", "clone", "--quiet", "--branch", registry.BRANCH, repository, folder])
    for key, value in (("user.name", "A user"), ("user.email", "user@example.com")):
        subprocess.check_call(["git", "-C", folder, "config", key, value])
    yield folder
    subprocess.check_call(["git", "-C", folder, "push", "--quiet", "--force", "origin", f"{before}:refs/heads/{registry.BRANCH}"])


@pytest.fixture
def checkout(layout: Layout, settings: Settings, tmp_path: Path) -> Iterator[Path]:
    """A clone for one test."""
    with cloned(registry.git_repository(layout, settings), tmp_path / "clone") as folder:
        yield folder


@pytest.fixture(scope="module")
def shared_checkout(layout: Layout, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A clone for all tests of a module."""
    with cloned(registry.git_repository(layout, settings), tmp_path_factory.mktemp("user") / "clone") as folder:
        yield folder


@pytest.fixture(scope="session")
def push() -> Callable[[Path, str], None]:
    """Commit everything in a clone and push it."""
    def push_all(folder: Path, message: str) -> None:
        subprocess.check_call(["git", "-C", folder, "add", "--all"])
        subprocess.check_call(["git", "-C", folder, "commit", "--quiet", "--message", message])
        subprocess.check_call(["git", "-C", folder, "push", "--quiet", "origin", f"HEAD:{registry.BRANCH}"])
    return push_all


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
