"""The environments' checks name file, line and remedy; the Helm command is the ApplicationSet's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from tools import environments
from tools.layout import REPOSITORY


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with the environments and charts of this one, to be broken."""
    shutil.copytree(REPOSITORY / "environments", tmp_path / "environments")
    shutil.copytree(REPOSITORY / "charts", tmp_path / "charts", ignore=shutil.ignore_patterns("*.tgz"))
    return tmp_path


def edit(root: Path, file: str, old: str, new: str) -> int:
    """Replace text in a file of environments/; returns the line of the change."""
    path = root / "environments" / file
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{file} has no {old!r}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return text[:text.index(old)].count("\n") + 1


def only(root: Path) -> tuple[str, int, str]:
    """File, line and message of the only finding."""
    findings = environments.check(root)
    assert len(findings) == 1, [f.text(root) for f in findings]
    return findings[0].path.relative_to(root / "environments").as_posix(), findings[0].line, findings[0].message


def test_the_environments_of_this_checkout() -> None:
    assert [f.text(REPOSITORY) for f in environments.check()] == []
    assert environments.names() == ["dev", "local", "prod", "staging"]


@pytest.mark.parametrize(("file", "old", "new", "line_of_new", "says"), [
    ("local/release.yaml", "version: 0.1.0", "version: v1", 0, "does not match"),
    ("local/release.yaml", "follow: latest", "follow: newest", 0, "not one of"),
    ("local/release.yaml", "  enabled: true", "  enabled: true\n  replicas: 2", 1, "chatbot.replicas is not known here. Known: config"),
    ("local/site.yaml", "  nodes: 1\n", "  nodes: one\n", 0, "global.nodes"),
    ("local/site.yaml", "      nodePort: 30265", "      nodePort: 265", 0, "ray-cluster.head.dashboard.nodePort"),
    ("local/site.yaml", "  head:\n", "  heed:\n", 0, "ray-cluster.heed is not known here"),
    ("local/site.yaml", "chatbot:\n", "finetune-job:\n  enabled: true\nchatbot:\n", 0, "finetune.yaml says what is trained"),
    ("local/site.yaml", "global:\n", "global:\n  images: {trainer: {digest: x}}\n", 1, "release.yaml pins images"),
    ("local/finetune.yaml", "learning_rate: 5.0e-5", "learning_rate: 5", 0, "run.train.learning_rate"),
    ("local/finetune.yaml", "tokens_per_step: 1024", "tokens_per_step: 128", 0, "at least one micro-batch"),
    ("local/finetune.yaml", "    seed: 17", "    seed: 17\n    sead: 18", 1, "run.sead"),
    ("local/finetune.yaml", "    seed: 17", "    seed: 17\n    seed: 18", 1, "given twice (first in line"),
    ("local/finetune.yaml", "workers: 2", "workers: 0", 0, "workers"),
    ("dev/finetune.yaml", "revision: 0e9e39f249a16976918f6564b8830bc894c89659", "revision: main", 0, "40-digit commit"),
])
def test_a_wrong_value_is_named_with_its_line(root: Path, file: str, old: str, new: str, line_of_new: int, says: str) -> None:
    line = edit(root, file, old, new)
    where, found, message = only(root)
    assert (where, found) == (file, line + line_of_new)
    assert says in message


def test_a_value_belongs_to_one_file(root: Path) -> None:
    line = edit(root, "local/site.yaml", "  config:\n", "  enabled: true\n  config:\n")
    assert only(root)[:2] == ("local/site.yaml", line)


def test_a_missing_file_and_broken_yaml(root: Path) -> None:
    (root / "environments/dev/site.yaml").unlink()
    edit(root, "prod/site.yaml", "global:", "global: [")
    findings = environments.check(root)
    assert {f.path.relative_to(root / "environments").as_posix() for f in findings} == {"dev/site.yaml", "prod/site.yaml"}
    assert "missing" in findings[0].message and "Not valid YAML" in findings[1].message


def test_a_served_run_needs_its_digest_and_does_not_follow(root: Path) -> None:
    path = root / "environments/staging/release.yaml"
    release = yaml.safe_load(path.read_text(encoding="utf-8"))
    release["chatbot"] = {"enabled": True, "config": {"serve": {"follow": "none", "run": "pubmedqa-0123456789"}}}
    path.write_text(yaml.safe_dump(release), encoding="utf-8")
    assert "sha256" in only(root)[2]
    release["chatbot"]["config"]["serve"] |= {"sha256": "0" * 64, "follow": "latest"}
    path.write_text(yaml.safe_dump(release), encoding="utf-8")
    assert "contradict" in only(root)[2]
    release["chatbot"]["config"]["serve"]["follow"] = "none"
    path.write_text(yaml.safe_dump(release), encoding="utf-8")
    assert environments.check(root) == []


def test_a_folder_name_that_is_no_namespace(root: Path) -> None:
    shutil.copytree(root / "environments/staging", root / "environments/Staging_2")
    assert "names a namespace" in only(root)[2]


def test_a_malformed_gate(root: Path) -> None:
    (root / "environments/prod/gate.yaml").write_text("loss: {better_then_base: true}\n", encoding="utf-8")
    where, _, message = only(root)
    assert where == "prod/gate.yaml" and "better_then_base" in message


def test_numbers_are_read_as_helm_reads_them(root: Path) -> None:
    edit(root, "local/finetune.yaml", "learning_rate: 5.0e-5", "learning_rate: 5e-5")
    assert environments.check(root) == []
    values = environments.load("local", root).values
    assert values["finetune-job"]["run"]["train"]["learning_rate"] == 5e-5


def test_helm_command() -> None:
    command = environments.helm_command("dev", chart="oci://registry.example.com/charts/llm-finetune")
    assert command[:4] == ["helm", "upgrade", "--install", "--create-namespace"]
    assert command[command.index("--namespace") + 1] == "llm-finetune-dev"
    assert command[command.index("--version") + 1] == "0.1.0"
    assert [Path(c).name for c, flag in zip(command[1:], command, strict=False) if flag == "--values"] == list(environments.ORDER)
