"""Suites of `make`: each target makes what its tests start, so that it passes on a fresh machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.checks import SUITES
from tools.layout import REPOSITORY

TARGETS = {suite: (target, set(needs.split())) for target, needs, suite in re.findall(
    r"^([a-z0-9-]+):(.*?)##.*\n\t.*-m tools\.checks (\w+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)}
ENVIRONMENTS = {"tools": "$(TOOLS_VENV)", "trainer": "$(TRAINER_VENV)", "chatbot": "$(CHATBOT_VENV)"}


def _sources(paths: list[str]) -> str:
    files = [file for path in map(Path, paths) for file in ([path] if path.suffix else sorted((REPOSITORY / path).rglob("*.py")))]
    return "".join((REPOSITORY / file).read_text() for file in files)


def test_every_suite_has_a_target() -> None:
    assert set(TARGETS) == set(SUITES)


@pytest.mark.parametrize("suite", SUITES)
def test_a_target_makes_what_its_tests_start(suite: str) -> None:
    target, made = TARGETS[suite]
    needed = {ENVIRONMENTS[check.command[0]] for check in SUITES[suite]}
    on_a_cluster = _sources([word for check in SUITES[suite] for word in check.command if word.startswith(("tests/e2e", "tests/nodes"))])
    needed |= {ENVIRONMENTS[name] for name in re.findall(r"venv/(\w+)/bin", on_a_cluster)}
    if "/usr/bin/chromium" in on_a_cluster:
        needed.add("$(CHROMIUM)")
    assert needed <= made, f"make {target} runs tests that need {' '.join(sorted(needed - made))}"
