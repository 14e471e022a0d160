"""Rollback: an environment returns to the release before, by a commit.

    make rollback ENV=staging

The release before is the last committed release.yaml that says something else. A rollback is itself a commit, and is marked: rolling back
again goes on to the release before that one, not back to the one that was left.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tools import environments
from tools.errors import OperatorError
from tools.layout import REPOSITORY
from tools.promote import load_checked
from tools.repository import Repository

TRAILER = re.compile(r"^Rolled-Back-To: ([0-9a-f]{40})$", re.MULTILINE)


@dataclass(frozen=True)
class Release:
    """A committed release.yaml."""

    commit: str
    text: str

    @property
    def value(self) -> Any:
        return yaml.safe_load(self.text)


def previous(repository: Repository, path: str) -> Release:
    """The release before the one at HEAD. Raises OperatorError if there is none."""
    current = repository.show("HEAD", path)
    if current is None:
        raise OperatorError(f"{path} is not committed, so there is nothing to return to.")
    now = yaml.safe_load(current)
    skip_until = ""
    for commit in repository.git("log", "--format=%H", "--", path).split():
        if skip_until and commit != skip_until:
            continue
        marked = TRAILER.search(repository.git("show", "-s", "--format=%B", commit))
        text = repository.show(commit, path)
        if text is None:
            break
        if marked:
            skip_until = marked[1]
            continue
        skip_until = ""
        if yaml.safe_load(text) != now:
            return Release(commit, text)
    raise OperatorError(f"{path} has no release before this one in the history of this branch.")


def describe(release: Any) -> str:
    """One line: what a release deploys."""
    serve = release.get("chatbot", {}).get("config", {}).get("serve", {})
    served = serve.get("run") or ("the latest run" if serve.get("follow") == "latest" else "nothing")
    if not release.get("chatbot", {}).get("enabled"):
        served = "nothing"
    return f"chart {release['global']['release']['chart']['version']}, serving {served}"


def rollback(name: str, root: Path = REPOSITORY) -> Release:
    """Commit the release before on a branch and print how to push it."""
    repository = Repository(root)
    upstream = repository.require_current()
    environment = load_checked(name, root)
    path = environment.documents["release.yaml"].path.relative_to(root).as_posix()
    before = previous(repository, path)
    now = environment.documents["release.yaml"].value
    document = environment.documents["release.yaml"]
    findings = environments.validate(before.value, environments.read_schema("release.yaml", root), lambda _: (document, 1))
    if findings:
        raise OperatorError(f"The release of {before.commit[:12]} is no longer valid: {findings[0].message}\nWrite {path} by hand.")
    message = (f"Roll {name} back to the release of {before.commit[:12]}\n\nFrom  {describe(now)}\nTo    {describe(before.value)}\n\n"
               f"Rolled-Back-To: {before.commit}\n")
    branch = f"rollback/{name}/{before.commit[:12]}"
    commit = repository.commit_file(branch, path, before.text, message)
    print(message)
    print(f"Committed {commit[:12]} on {branch}. Next:")
    for line in repository.push_commands(branch, upstream):
        print(f"  {line}")
    return before


def add_parser(commands: Any) -> None:
    """`rollback ENV`."""
    parser: argparse.ArgumentParser = commands.add_parser("rollback", help="return an environment to the release before")
    parser.add_argument("environment")
    parser.set_defaults(run=lambda a: rollback(a.environment) and 0)
