"""Promotion and rollback with real git repositories and run directories."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import environments
from tools.errors import OperatorError
from tools.layout import REPOSITORY
from tools.promote import promote, storage_of
from tools.repository import Repository
from tools.rollback import previous, rollback
from tools.runs import FolderStore, verify
from trainer.files import directory_digest, write_directory, write_json

RUN = "pubmedqa-0123456789"
RELEASE = "environments/staging/release.yaml"


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Git without the user's own settings."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    for kind in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{kind}_NAME", "An Operator")
        monkeypatch.setenv(f"GIT_{kind}_EMAIL", "operator@example.com")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A clone, even with its remote."""
    origin, clone = tmp_path / "origin.git", tmp_path / "clone"
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch=main", str(origin))
    git(tmp_path, "clone", "--quiet", str(origin), str(clone))
    git(clone, "checkout", "--quiet", "-b", "main")
    shutil.copytree(REPOSITORY / "environments", clone / "environments")
    git(clone, "add", "--all")
    git(clone, "commit", "--quiet", "--message", "Environments")
    git(clone, "push", "--quiet", "--set-upstream", "origin", "main")
    return clone


def report(run: str, sha256: str, gain: float = 0.3, **fields: Any) -> dict[str, Any]:
    """A report as trainer/report writes it, with the loss `gain` better than the base's."""
    difference = {"mean": -gain, "low": -gain - 0.1, "high": -gain + 0.1, "better": "lower", "rows": 40, "bounds": {"0.95": gain - 0.08}}
    same = {"mean": 0.01, "low": -0.01, "high": 0.03, "better": "higher", "rows": 40, "bounds": {"0.95": -0.005}}
    return {"run": run, "state": "finished", "checkpoint_sha256": sha256, "base_model": "base", "dataset": "sample", "method": "full",
            "base": {"loss": 2.0, "token_f1": 0.2, "decision_accuracy": 0.5},
            "tuned": {"loss": 2.0 - gain, "token_f1": 0.21, "decision_accuracy": 0.51},
            "difference": {"loss": difference, "token_f1": same, "decision_accuracy": same},
            "samples": [{"id": "row-1", "question": "Does it help?", "context": "", "tuned": "It helped most patients.\nDecision: yes"}],
            "train": {"steps": 10, "tokens": 9000}, "contamination": {"share": 0.0, "flagged": 0, "rows": 40},
            "evaluation": {"rows_sha256": "r"}, **fields}


def make_run(storage: Path, run: str = RUN, **fields: Any) -> str:
    """A finished run on a storage; returns the digest of its model."""
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "model.safetensors").write_bytes(run.encode() * 100)
        (folder / "config.json").write_text("{}")
        return {"step": 10}

    digest = directory_digest(write_directory(storage / "runs" / run / "model", fill))
    write_json(storage / "runs" / run / "report.json", report(run, digest, **fields))
    return digest


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    folder = tmp_path / "storage"
    make_run(folder)
    return folder


def merge_branch(root: Path, branch: str) -> None:
    git(root, "merge", "--quiet", "--ff-only", branch)
    git(root, "push", "--quiet", "origin", "main")


def test_a_run_that_passes_is_committed_with_its_evidence(root: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, before = git(root, "rev-parse", "HEAD"), (root / RELEASE).read_text()
    planned = promote("dev", "staging", storage=str(storage), root=root)
    assert git(root, "rev-parse", "HEAD") == head and (root / RELEASE).read_text() == before, "the checkout stays as it is"
    assert git(root, "status", "--porcelain") == ""
    assert git(root, "diff", "--name-only", "HEAD", planned.branch) == RELEASE
    release = yaml.safe_load(git(root, "show", f"{planned.branch}:{RELEASE}"))
    digest = verify(FolderStore(storage), RUN).sha256
    assert release["chatbot"] == {"enabled": True, "config": {"serve": {"follow": "none", "run": RUN, "sha256": digest}}}
    assert release["global"]["release"] == {"chart": {"version": "0.1.0"}}
    assert set(release["global"]["images"]) == {"trainer", "chatbot"}, "images of charts that staging has off stay out"
    message = git(root, "show", "-s", "--format=%B", planned.branch)
    for text in (f"Promote {RUN} from dev to staging", digest, "1.7", "loss: improves by", "contamination: 0 of 40", f"Run: {RUN}",
                 f"Report   runs/{RUN}/report.html"):
        assert text in message
    output = capsys.readouterr().out
    assert f"git push origin {planned.branch}" in output and "pinned by tag" in output


def test_the_promoted_release_passes_the_checks(root: Path, storage: Path) -> None:
    merge_branch(root, promote("dev", "staging", storage=str(storage), root=root).branch)
    assert environments.check(root) == []
    with pytest.raises(OperatorError, match="serves pubmedqa-0123456789 already"):
        promote("dev", "staging", run=RUN, storage=str(storage), root=root)
    chained = promote("staging", "prod", storage=str(storage), root=root)
    assert chained.run.id == RUN, "the run that staging serves"


def test_the_page_that_shows_the_report_is_named(root: Path, storage: Path) -> None:
    merge_branch(root, promote("dev", "staging", storage=str(storage), root=root).branch)
    site = root / "environments/staging/site.yaml"
    value = yaml.safe_load(site.read_text(encoding="utf-8"))
    value.setdefault("chatbot", {})["ingress"] = {"enabled": True, "host": "chat.staging.example.com", "tlsSecretName": "chat-tls"}
    site.write_text(yaml.safe_dump(value), encoding="utf-8")
    git(root, "commit", "--quiet", "--all", "--message", "An Ingress")
    git(root, "push", "--quiet", "origin", "main")
    message = promote("staging", "prod", storage=str(storage), root=root).message
    assert f"Report   runs/{RUN}/report.html, https://chat.staging.example.com/report" in message


def test_the_gate_refuses_and_the_override_is_recorded(root: Path, storage: Path) -> None:
    make_run(storage, gain=-0.5)
    with pytest.raises(OperatorError, match=r"(?s)gate of staging.*loss: improves by -0.5.*FORCE=1"):
        promote("dev", "staging", storage=str(storage), root=root)
    assert git(root, "branch", "--list", "promote/*") == ""
    with pytest.raises(OperatorError, match="needs REASON"):
        promote("dev", "staging", storage=str(storage), force=True, reason=" ", root=root)
    planned = promote("dev", "staging", storage=str(storage), force=True, reason="demo for the board", root=root)
    message = git(root, "show", "-s", "--format=%B", planned.branch)
    assert "gate overridden" in message and "Gate-Overridden: demo for the board" in message and "FAIL loss" in message


def test_a_reason_alone_is_no_override(root: Path, storage: Path) -> None:
    make_run(storage, gain=-0.5)
    with pytest.raises(OperatorError, match="gate"):
        promote("dev", "staging", storage=str(storage), reason="because", root=root)


def test_an_environment_has_its_own_gate(root: Path, storage: Path) -> None:
    (root / "environments/staging/gate.yaml").write_text("decision_accuracy: {min: 0.9}\n")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "Gate")
    git(root, "push", "--quiet")
    with pytest.raises(OperatorError, match=r"environments/staging/gate.yaml.*refuses(?s:.*)needed: at least 0.9"):
        promote("dev", "staging", storage=str(storage), root=root)


def test_worse_than_what_is_served_is_refused(root: Path, storage: Path) -> None:
    (root / "environments/staging/gate.yaml").write_text("loss: {not_worse_than_served: 0.05}\n")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "Gate")
    git(root, "push", "--quiet")
    merge_branch(root, promote("dev", "staging", storage=str(storage), root=root).branch)
    make_run(storage, "pubmedqa-aaaaaaaaaa", gain=0.1)
    with pytest.raises(OperatorError, match=r"served 1\.7"):
        promote("dev", "staging", run="pubmedqa-aaaaaaaaaa", storage=str(storage), root=root)


def test_damaged_weights_are_refused_even_with_force(root: Path, storage: Path) -> None:
    weights = storage / "runs" / RUN / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[50] ^= 1
    weights.write_bytes(data)
    with pytest.raises(OperatorError, match="damaged or was replaced"):
        promote("dev", "staging", storage=str(storage), force=True, reason="x", root=root)
    weights.unlink()
    with pytest.raises(OperatorError, match=r"model\.safetensors is missing"):
        promote("dev", "staging", storage=str(storage), root=root)


def test_a_report_about_other_weights_is_refused(root: Path, storage: Path) -> None:
    file = storage / "runs" / RUN / "report.json"
    write_json(file, {**json.loads(file.read_text()), "checkpoint_sha256": "0" * 64})
    with pytest.raises(OperatorError, match="its report is about"):
        promote("dev", "staging", storage=str(storage), root=root)
    write_json(file, report("other-0123456789", "0" * 64))
    with pytest.raises(OperatorError, match="copied or renamed"):
        promote("dev", "staging", storage=str(storage), root=root)


def test_an_unfinished_run_is_refused(root: Path, storage: Path) -> None:
    make_run(storage, state="incomplete")
    with pytest.raises(OperatorError, match="incomplete, not finished"):
        promote("dev", "staging", storage=str(storage), root=root)


def test_the_newest_finished_run_is_chosen(root: Path, storage: Path) -> None:
    make_run(storage, "pubmedqa-bbbbbbbbbb")
    os.utime(storage / "runs" / RUN / "report.json", (1, 1))
    (storage / "runs" / "by-hand").mkdir()
    write_json(storage / "runs" / "by-hand" / "report.json", {})
    assert FolderStore(storage).runs() == ["pubmedqa-bbbbbbbbbb", RUN]
    assert promote("dev", "staging", storage=str(storage), root=root).run.id == "pubmedqa-bbbbbbbbbb"


def test_a_target_without_the_weights_is_told_how_to_get_them(root: Path, storage: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "runs").mkdir(parents=True)
    with pytest.raises(OperatorError, match="rsync"):
        promote("dev", "staging", storage=str(storage), target_storage=str(other), root=root)
    shutil.copytree(storage / "runs" / RUN, other / "runs" / RUN)
    (other / "runs" / RUN / "model" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(OperatorError, match="damaged"):
        promote("dev", "staging", storage=str(storage), target_storage=str(other), root=root)


def test_a_target_that_runs_nothing_yet_is_read_through_the_source(root: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def find(api: Any, namespace: str) -> FolderStore:
        asked.append(namespace)
        return FolderStore(storage)

    monkeypatch.setattr("tools.promote.PodStore.find", find)
    monkeypatch.setattr("tools.promote.cluster_api", lambda context: None)
    assert promote("dev", "staging", root=root).run.id == RUN
    assert asked == ["llm-finetune-dev"], "both mount one export"
    site = root / "environments/staging/site.yaml"
    site.write_text(site.read_text().replace("/export/llm-finetune", "/export/other"))
    git(root, "commit", "--quiet", "--all", "--message", "An export of its own")
    git(root, "push", "--quiet")
    git(root, "branch", "--quiet", "-D", f"promote/staging/{RUN}")
    asked.clear()
    promote("dev", "staging", root=root)
    assert asked == ["llm-finetune-dev", "llm-finetune-staging"]


@pytest.mark.parametrize(("site", "same_cluster", "other_cluster"), [
    ({"mode": "external", "external": {"server": "nfs", "path": "/a"}}, True, True),
    ({"mode": "external", "external": {"server": "nfs", "path": "/a", "provisioning": "dynamic"}}, False, False),
    ({"mode": "inCluster", "inCluster": {"clusterIP": "10.0.0.9"}}, True, False),
    ({"mode": "nodePath", "nodePath": {"path": "/data"}}, True, False),
    ({"mode": "existingClaim"}, False, False),
    ({"enabled": False, "mode": "nodePath", "nodePath": {"path": "/data"}}, False, False),
])
def test_storages_that_are_the_same(root: Path, site: Any, same_cluster: bool, other_cluster: bool) -> None:
    (root / "environments/staging/site.yaml").write_text(yaml.safe_dump({"nfs-provisioner": site}))
    environment = environments.load("staging", root)
    place = storage_of(environment, "here")
    assert (place is not None and place == storage_of(environment, "here")) is same_cluster
    assert (place is not None and place == storage_of(environment, "there")) is other_cluster


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda r: (r / RELEASE).write_text("{}"), "not committed"),
    (lambda r: (r / "note.txt").write_text("x"), "not committed"),
    (lambda r: git(r, "checkout", "--quiet", "--detach"), "on no branch"),
    (lambda r: git(r, "commit", "--quiet", "--allow-empty", "--message", "x"), "ahead"),
    (lambda r: git(r, "branch", "--unset-upstream"), "follows no remote branch"),
])
def test_a_tree_that_is_not_the_reviewed_one_is_refused(root: Path, storage: Path, spoil: Any, says: str) -> None:
    spoil(root)
    with pytest.raises(OperatorError, match=says):
        promote("dev", "staging", storage=str(storage), root=root)


def test_a_tree_behind_or_diverged_is_refused(root: Path, storage: Path, tmp_path: Path) -> None:
    other = tmp_path / "colleague"
    git(tmp_path, "clone", "--quiet", str(tmp_path / "origin.git"), str(other))
    git(other, "commit", "--quiet", "--allow-empty", "--message", "theirs")
    git(other, "push", "--quiet")
    with pytest.raises(OperatorError, match="1 commits behind"):
        promote("dev", "staging", storage=str(storage), root=root)
    git(root, "commit", "--quiet", "--allow-empty", "--message", "ours")
    with pytest.raises(OperatorError, match="diverged"):
        promote("dev", "staging", storage=str(storage), root=root)


def test_rollback_goes_back_one_release_at_a_time(root: Path, storage: Path) -> None:
    first = yaml.safe_load((root / RELEASE).read_text())
    merge_branch(root, promote("dev", "staging", storage=str(storage), root=root).branch)
    second = yaml.safe_load((root / RELEASE).read_text())
    make_run(storage, "pubmedqa-cccccccccc")
    merge_branch(root, promote("dev", "staging", run="pubmedqa-cccccccccc", storage=str(storage), root=root).branch)

    before = rollback("staging", root)
    assert before.value == second
    merge_branch(root, f"rollback/staging/{before.commit[:12]}")
    assert yaml.safe_load((root / RELEASE).read_text()) == second
    assert environments.check(root) == []

    again = rollback("staging", root)
    assert again.value == first, "not to the release that was left"
    merge_branch(root, f"rollback/staging/{again.commit[:12]}")
    with pytest.raises(OperatorError, match="no release before"):
        previous(Repository(root), RELEASE)


def test_unknown_environments_are_named(root: Path, storage: Path) -> None:
    with pytest.raises(OperatorError, match="dev, local, prod, staging"):
        promote("dev", "stagign", storage=str(storage), root=root)
    with pytest.raises(OperatorError, match="both dev"):
        promote("dev", "dev", storage=str(storage), root=root)


def test_an_answer_that_the_targets_chatbot_would_not_let_through_is_refused(root: Path, storage: Path) -> None:
    leak = {"id": "row-2", "question": "Whom do I ask?", "context": "", "tuned": "Ask john.doe@example.com about the trial."}
    make_run(storage, samples=[leak])
    with pytest.raises(OperatorError, match=r"sample row-2: .*personal-data"):
        promote("dev", "staging", storage=str(storage), root=root)
