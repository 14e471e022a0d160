"""The node's OCI registry (images and charts) and its git server, both on the node's own address."""

from __future__ import annotations

from pathlib import Path

import httpx

from tools import shell
from tools.cluster.daemons import Daemon
from tools.cluster.network import listens
from tools.cluster.settings import Settings
from tools.errors import OperatorError
from tools.layout import REPOSITORY, Layout

BRANCH = "main"


def registry(layout: Layout, settings: Settings, *, read_only: bool = False) -> Daemon:
    """Debian's docker-registry. What is pushed lies in the cache. It knows no users: where other servers reach it, only for reading."""
    storage = layout.cache / "registry"
    config = layout.state / "registry.yaml"
    storage.mkdir(parents=True, exist_ok=True)
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(f"""version: 0.1
log: {{level: warn, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: {storage}}}
  delete: {{enabled: true}}
  maintenance: {{readonly: {{enabled: {str(read_only).lower()}}}}}
http:
  addr: {settings.registry}
""")

    def ready() -> bool:
        try:
            return httpx.get(f"http://{settings.registry}/v2/", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False
    return Daemon("registry", [layout.debian / "root/usr/bin/docker-registry", "serve", config], ready, timeout=30,
                  env={"OTEL_TRACES_EXPORTER": "none"})


def git_repository(layout: Layout, settings: Settings) -> Path:
    """Where users push to, on this machine."""
    return layout.state / "git" / f"{settings.name}.git"


def git_server(layout: Layout, settings: Settings) -> Daemon:
    """git's own daemon, read-only: users push by path, Argo CD pulls from here."""
    base = git_repository(layout, settings).parent
    return Daemon("git", ["git", "daemon", f"--base-path={base}", "--export-all", f"--listen={settings.address}",
                          f"--port={settings.git_port}", "--reuseaddr", base],
                  ready=lambda: listens(settings.address, settings.git_port), timeout=10)


def push_head(layout: Layout, settings: Settings) -> str:
    """Make the bare repository if it is missing and push this checkout's HEAD to its main branch. Returns what was done.

    Commits that a user pushed from elsewhere are never overwritten.
    """
    repository = git_repository(layout, settings)
    if not (repository / "HEAD").exists():
        repository.parent.mkdir(parents=True, exist_ok=True)
        shell.output(["git", "init", "--quiet", "--bare", f"--initial-branch={BRANCH}", repository])
    git: list[str | Path] = ["git", "-C", REPOSITORY]
    if not shell.succeeds([*git, "rev-parse", "--verify", "--quiet", "HEAD"]):
        raise OperatorError(f"{REPOSITORY} is not a git checkout with a commit. Clone the project with git; Argo CD deploys from commits.")
    head = shell.output([*git, "rev-parse", "HEAD"]).strip()
    there = shell.output(["git", "-C", repository, "for-each-ref", "--format=%(objectname)", f"refs/heads/{BRANCH}"]).strip()
    if there == head:
        return f"{head[:10]} was there"
    if there and not shell.succeeds([*git, "merge-base", "--is-ancestor", there, "HEAD"]):
        return f"{there[:10]} stays: it has commits that this checkout has not. To replace it: git push --force {repository} HEAD:{BRANCH}"
    shell.output([*git, "push", "--quiet", repository, f"HEAD:refs/heads/{BRANCH}"])
    return f"{head[:10]} pushed"
