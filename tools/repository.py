"""Commits made beside the checkout: a branch with one file changed, without touching the working tree."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.errors import OperatorError


@dataclass(frozen=True)
class Repository:
    """A git checkout."""

    root: Path

    def git(self, *arguments: str, stdin: str | None = None, env: Mapping[str, str] | None = None, strip: bool = True) -> str:
        """Output of a git command. Raises OperatorError with what git says."""
        done = subprocess.run(["git", *arguments], cwd=self.root, input=stdin, capture_output=True, text=True, check=False,
                              env={**os.environ, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", **(env or {})})
        if done.returncode != 0:
            raise OperatorError(f"git {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.strip() if strip else done.stdout

    def try_git(self, *arguments: str) -> str | None:
        """The same, or None if git fails."""
        try:
            return self.git(*arguments)
        except OperatorError:
            return None

    def show(self, commit: str, path: str) -> str | None:
        """A file at a commit, as it is; None if it is not there."""
        try:
            return self.git("show", f"{commit}:{path}", strip=False)
        except OperatorError:
            return None

    def upstream(self) -> str | None:
        """The branch that the current one follows, `<remote>/<branch>`."""
        return self.try_git("rev-parse", "--abbrev-ref", "--symbolic-full-name", "@{upstream}")

    def require_current(self, fetch: bool = True) -> str | None:
        """Refuse a tree that is not what the remote has: what is promoted must be what was reviewed. Returns the upstream, if any."""
        if self.try_git("symbolic-ref", "-q", "HEAD") is None:
            raise OperatorError("HEAD is on no branch. Check out the branch that the environments are deployed from.")
        if dirty := self.git("status", "--porcelain", "--untracked-files=normal", "--", ".", strip=False).rstrip():
            shown = "\n".join(dirty.splitlines()[:10])
            raise OperatorError(f"The working tree has changes that are not committed:\n{shown}\nCommit or remove them first.")
        upstream = self.upstream()
        if upstream is None:
            if remotes := self.git("remote").split():
                raise OperatorError(f"The branch follows no remote branch, so nobody can tell whether it is current. "
                                    f"Run `git branch --set-upstream-to={remotes[0]}/<branch>` (remotes: {', '.join(remotes)}).")
            return None
        if fetch:
            self.git("fetch", "--quiet", upstream.split("/", 1)[0])
        ahead, behind = (int(n) for n in self.git("rev-list", "--left-right", "--count", f"HEAD...{upstream}").split())
        if ahead and behind:
            raise OperatorError(f"The branch and {upstream} have diverged ({ahead} and {behind} commits). Rebase or merge first.")
        if behind:
            raise OperatorError(f"The branch is {behind} commits behind {upstream}. Run `git pull --ff-only` first.")
        if ahead:
            raise OperatorError(f"The branch is {ahead} commits ahead of {upstream}: these would be promoted along. Push them first.")
        return upstream

    def commit_file(self, branch: str, path: str, content: str, message: str) -> str:
        """A new branch from HEAD with one commit that changes one file; index and working tree stay as they are. Returns the commit."""
        if self.try_git("rev-parse", "--verify", "--quiet", f"refs/heads/{branch}"):
            raise OperatorError(f"The branch {branch} exists. Push it, or remove it with `git branch -D {branch}`.")
        blob = self.git("hash-object", "-w", "--stdin", "--path", path, stdin=content)
        with tempfile.TemporaryDirectory() as folder:
            env = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            self.git("read-tree", "HEAD", env=env)
            self.git("update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", env=env)
            tree = self.git("write-tree", env=env)
        if tree == self.git("rev-parse", "HEAD^{tree}"):
            raise OperatorError(f"{path} says this already; there is nothing to commit.")
        commit = self.git("commit-tree", tree, "-p", "HEAD", "-F", "-", stdin=message)
        self.git("update-ref", f"refs/heads/{branch}", commit, "")
        return commit

    def push_commands(self, branch: str, upstream: str | None) -> list[str]:
        """How the commit gets to where it is deployed from: by review, or straight."""
        remotes = [upstream] if upstream else [f"{r}/{self.git('symbolic-ref', '--short', 'HEAD')}" for r in self.git("remote").split()]
        lines = []
        for target in remotes:
            remote, name = target.split("/", 1)
            lines += [f"git push {remote} {branch}    (then open a pull request into {name})",
                      f"git push {remote} {branch}:{name}    (straight, where no review is needed)"]
        return lines or [f"git merge --ff-only {branch}"]
