"""What a push would change: the runs that start and why, and the objects."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import diff, environments, runid
from tools.layout import REPOSITORY


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed checkout of charts and environments."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for kind in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{kind}_NAME", "An Operator")
        monkeypatch.setenv(f"GIT_{kind}_EMAIL", "operator@example.com")
    shutil.copytree(REPOSITORY / "environments", tmp_path / "environments")
    shutil.copytree(REPOSITORY / "charts", tmp_path / "charts", ignore=shutil.ignore_patterns("*.tgz", "crds"))
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "All")
    return tmp_path


def edit(root: Path, file: str, old: str, new: str) -> None:
    path = root / "environments" / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_no_change(root: Path) -> None:
    text = diff.report("local", live=False, root=root)
    assert "none would start" in text and "Objects that the push changes: 0" in text


def test_an_edited_run_starts_and_the_old_one_stays(root: Path) -> None:
    before = next(k[2] for k in diff.render("local", root) if k[0] == "RayJob")
    edit(root, "local/finetune.yaml", "learning_rate: 5.0e-5", "learning_rate: 2.0e-5")
    text = diff.report("local", live=False, root=root)
    after = next(k[2] for k in diff.render("local", root) if k[0] == "RayJob")
    assert f"{after} would START" in text and before != after
    assert "train.learning_rate: 5e-05 -> 2e-05" in text
    assert f"{before} is left as it is" in text
    assert text.count(" -> ") == 1, "only what was edited is named"


def test_a_run_that_exists_is_not_trained_again(root: Path) -> None:
    before = diff.render("local", root)
    edit(root, "local/finetune.yaml", "seed: 17", "seed: 18")
    after = diff.render("local", root)
    name = next(k[2] for k in after if k[0] == "RayJob")
    lines = diff.started(before, after, {name: "SUCCEEDED"})
    assert lines[0] == f"{name} exists already (SUCCEEDED): nothing is trained again"
    assert "delete its RayJob" in diff.started(before, after, {name: "FAILED"})[0]


def test_resources_do_not_start_a_run(root: Path) -> None:
    edit(root, "local/finetune.yaml", "max_failures: 3", "max_failures: 4")
    text = diff.report("local", live=False, root=root)
    assert "none would start" in text and "changed RayJob" in text


def test_objects_come_and_go(root: Path) -> None:
    edit(root, "local/release.yaml", "enabled: true", "enabled: false")
    edit(root, "local/site.yaml", "    memory: 2Gi", "    memory: 3Gi")
    text = diff.report("local", live=False, root=root)
    assert "gone    Deployment llm-finetune-local/llm-finetune-chatbot" in text
    assert "changed RayCluster llm-finetune-local/llm-finetune" in text
    assert "+" in text and "memory: 3Gi" in text


def test_a_new_environment(root: Path) -> None:
    shutil.copytree(root / "environments/local", root / "environments/trial")
    text = diff.report("trial", live=False, root=root)
    assert "does not have it" in text and "would START" in text


def test_values_that_do_not_render(root: Path) -> None:
    edit(root, "local/finetune.yaml", "seed: 17", "seed: seventeen")
    with pytest.raises(diff.OperatorError, match="does not render"):
        diff.report("local", live=False, root=root)


def test_images_of_the_place_only_where_git_pins_none(root: Path) -> None:
    digest = "sha256:" + "ab" * 32
    images = {"trainer": {"repository": "10.0.0.1:5000/trainer", "digest": digest}}
    jobs = {name: next(m for k, m in diff.render(name, root, images).items() if k[0] == "RayJob") for name in ("local", "dev")}
    assert diff.run_of(jobs["local"])["image"] == f"10.0.0.1:5000/trainer@{digest}"
    assert diff.run_of(jobs["dev"])["image"] == "registry.example.com/llm-finetune/trainer:0.1.0"
    files = [root / "environments/local" / f for f in environments.ORDER]
    assert jobs["local"]["metadata"]["name"] == runid.of_values(files, {"global": {"images": images}})


def test_what_the_server_writes_is_no_difference() -> None:
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "namespace": "b"}, "data": {"k": "v"}}
    live = {**manifest, "metadata": {**manifest["metadata"], "uid": "1", "managedFields": [], "resourceVersion": "2",
                                     "annotations": {"argocd.argoproj.io/tracking-id": "x"}}, "status": {}}
    assert diff.compare({("a", "b", "c"): manifest}, {("a", "b", "c"): diff.clean(live)}) == []
