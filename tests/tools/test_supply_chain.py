"""Where everything comes from: locks with hashes, programs from pinned modules, images by digest, licences that are known."""

from __future__ import annotations

import re
import tomllib
from email.parser import HeaderParser
from pathlib import Path

import pytest

from tools import licences, sbom
from tools.cluster import sources
from tools.layout import REPOSITORY, Layout

LOCKS = sorted(p for p in REPOSITORY.rglob("uv.lock") if ".venv" not in p.parts)


def test_the_locks_are_all() -> None:
    assert {p.parent.relative_to(REPOSITORY).as_posix() for p in LOCKS} >= {"tools", "trainer", "chatbot"}
    assert {p.parent for p in LOCKS} == {p.parent for p in REPOSITORY.rglob("pyproject.toml") if p.parent != REPOSITORY}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda p: p.parent.name)
def test_every_file_of_a_lock_has_its_hash(lock: Path) -> None:
    packages = tomllib.loads(lock.read_text(encoding="utf-8"))["package"]
    for package in packages:
        if package["source"] == {"virtual": "."}:
            continue
        assert package["source"] == {"registry": "https://pypi.org/simple"}, package["name"]
        files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
        assert files and all(re.fullmatch(r"sha256:[0-9a-f]{64}", f["hash"]) for f in files), package["name"]
    assert len(packages) > 20


def test_images_install_what_the_locks_say() -> None:
    for dockerfile in (REPOSITORY / "images").glob("*/Dockerfile"):
        text = dockerfile.read_text(encoding="utf-8")
        assert text.count("uv sync") == text.count("uv sync --frozen"), dockerfile
        assert "pip install" not in text and "curl" not in text and "ADD http" not in text
        stages = [line.split() for line in text.splitlines() if line.startswith("FROM ")]
        own = {words[3] for words in stages if words[2:3] == ["AS"]}
        assert {words[1] for words in stages} <= {"scratch", "${BASE}"} | own, "no image is pulled"
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert makefile.count("(UV) sync") == makefile.count("(UV) sync --quiet --frozen") > 0


def test_programs_are_built_from_pinned_modules() -> None:
    """Every module has its checksums, which Go compares before it compiles, and none is replaced by a folder."""
    modules = sorted(sources.SOURCES.glob("*/go.mod"))
    assert len(modules) > 5 and "-mod=readonly" in sources.environment(Layout())["GOFLAGS"]
    for module in modules:
        sums = module.with_name("go.sum").read_text(encoding="utf-8")
        assert len(re.findall(r"^\S+ v\S+ h1:[A-Za-z0-9+/]{43}=$", sums, re.MULTILINE)) > 10, module
        for target in re.findall(r"=> (\S+)", module.read_text(encoding="utf-8")):
            assert not target.startswith((".", "/")), target


def test_the_page_of_licences_names_every_package() -> None:
    """`python -m tools.licences` writes it. Another Python may leave out packages that the page has, by their markers."""
    text = licences.PAGE.read_text(encoding="utf-8")
    listed = {name: licence for licence, names in re.findall(r"^\| (.+) \| (.+) \|$", text, re.MULTILINE) for name in names.split(", ")}
    assert licences.table(Layout()).items() <= listed.items()


def test_every_licence_is_known() -> None:
    found = licences.table(Layout())
    assert not [name for name, licence in found.items() if not licence]
    assert not [name for name, licence in found.items() if re.search(r"GPL|GNU|Affero", licence)], "say in docs/licences.md what follows"


@pytest.mark.parametrize("part", licences.IMAGES)
def test_what_is_listed_is_what_is_locked(part: str) -> None:
    """The environments here and the images are made from the same lock, so that the versions agree."""
    heads, locked = licences.installed(part, Layout()), licences.locked(part)
    both = [name for name in locked if name in heads]
    assert len(both) > 40 and not [name for name in both if heads[name]["Version"] not in locked[name]]
    assert {"torch", "transformers"} <= set(both) and not {"pytest", "hypothesis"} & set(locked)


@pytest.mark.parametrize(("header", "expected"), [
    ("License-Expression: MIT\nClassifier: License :: OSI Approved :: BSD License", [{"expression": "MIT"}]),
    ("Classifier: License :: OSI Approved\nClassifier: License :: OSI Approved :: BSD License", [{"license": {"name": "BSD License"}}]),
    ("License: Apache 2.0\n  and more", [{"license": {"name": "Apache 2.0"}}]), ("License: UNKNOWN", []), ("Name: x", [])])
def test_licences_of_a_package(header: str, expected: list[dict[str, object]]) -> None:
    assert sbom.licences(HeaderParser().parsestr(header)) == expected
