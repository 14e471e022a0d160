"""The documentation does not rot: links, make targets, commands, values and quoted messages are held to what is there.

Marks in the documents' fences, after the language:

    ```yaml values     a fragment of chart values that renders by itself
    ```yaml run        a trainer configuration that is accepted

In docs/troubleshooting.md a heading in backquotes is a message of this project, `…` standing for what varies in it.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import charts, environments
from tools.layout import REPOSITORY
from tools.runid import HelmLoader
from trainer import config as trainer_config
from trainer import schema as trainer_schema
from trainer.__main__ import arguments as trainer_arguments

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
NAMES = [d.relative_to(REPOSITORY).as_posix() for d in DOCUMENTS]
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .*\n?)+", re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)|``([^\n]+?)``|`([^`]+\n[^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SECTIONS = ("global", *(p.parent.name for p in charts.values_files() if p.parent != charts.CHART))
PLACEHOLDER = {"<env>": "dev", "<run>": "run-0123456789", "FILE": "run.yaml", "…": ""}


def text(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def fences(name: str, mark: str) -> list[str]:
    """Contents of the fences with this info string."""
    return [m[3] for m in FENCE.finditer(text(name)) if m[2].strip() == mark]


def marked(mark: str) -> list[Any]:
    """A test parameter for each such fence of all documents."""
    return [pytest.param(body, id=f"{name}-{i}") for name in NAMES for i, body in enumerate(fences(name, mark))]


def code(name: str) -> Iterator[str]:
    """Lines of commands: fences without the marks above, indented blocks, inline code. Continued lines are joined."""
    document = text(name)
    blocks = [m[3] for m in FENCE.finditer(document) if not m[2].startswith("yaml")]
    rest = FENCE.sub("", document)
    blocks += INDENTED.findall(rest)
    for block in blocks:
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines() if line.strip())
    yield from (" ".join((m[1] or m[2] or m[3]).split()) for m in INLINE.finditer(INDENTED.sub("", rest)))


def calls(program: str) -> list[tuple[str, str]]:
    """(document, arguments) of every `python -m <program> …` in the documents, up to a comment, pipe or end of the shell command."""
    found = []
    for name in NAMES:
        for line in code(name):
            for old, new in PLACEHOLDER.items():
                line = line.replace(old, new)
            for match in re.finditer(rf"python -m {re.escape(program)}(?![\w.])([^|&;#>`]*)", line):
                found.append((name, " ".join(match[1].split())))
    return sorted(set(found))


def slug(heading: str) -> str:
    """A heading's anchor, as the forges make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("name", NAMES)
def test_links(name: str) -> None:
    """Every relative link leads to a file, and its anchor to a heading there."""
    broken = []
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", FENCE.sub("", text(name)))):  # in code there are no links
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((REPOSITORY / name).parent / path).resolve() if path else REPOSITORY / name
        if not file.exists():
            broken.append(target)
        elif anchor and anchor not in {slug(h) for h in re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.M)}:
            broken.append(f"{target} (no such heading)")
    assert not broken


def test_every_document_is_in_the_index() -> None:
    index = {t.partition("#")[0] for t in LINK.findall(text("docs/README.md"))}
    missing = [n for n in NAMES if n.startswith("docs/") and n != "docs/README.md" and n.removeprefix("docs/") not in index]
    assert not missing
    assert "docs/README.md" in LINK.findall(text("README.md"))


@pytest.mark.parametrize("name", NAMES)
def test_make_targets(name: str) -> None:
    """Targets that the documents name are the Makefile's, and variables given to them are read somewhere."""
    makefile = text("Makefile")
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", makefile, re.M))
    readers = makefile + "".join(p.read_text(encoding="utf-8") for p in (REPOSITORY / "tools").rglob("*.py"))
    for line in code(name):
        for match in re.finditer(r"(?:^|[`(\s;&])make ([a-z][a-z0-9-]*)((?: [A-Z_]+=\S*)*)", line):
            assert match[1] in targets, f"make {match[1]}"
            for variable in re.findall(r"([A-Z_]+)=", match[2]):
                read = rf'\$\(+{variable}\)|\$\{{{variable}:|env\("{variable}"|get\("{variable}"'
                assert re.search(read, readers), f"{line}: {variable}"


@pytest.mark.parametrize("words", sorted({w for _, w in calls("trainer") if w}))
def test_trainer_commands(words: str) -> None:
    """The trainer's own parser takes the command (options that need a value are given one)."""
    argv = shlex.split(words)
    if argv[0] != "schema" and "--config" not in argv:
        argv += ["--config", "run.yaml"]
    assert trainer_arguments(argv).command == argv[0]


@functools.cache
def usage(program: str, words: tuple[str, ...]) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", program, *words, "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("program", "words"), sorted({(p, w) for p in ("tools", "chatbot") for _, w in calls(p) if w}))
def test_other_commands(program: str, words: str) -> None:
    """The subcommand exists, and its help names every option."""
    argv = shlex.split(words)
    options = [a.partition("=")[0] for a in argv if a.startswith("--")]
    positional = tuple(a for a in argv[:next((i for i, a in enumerate(argv) if a.startswith("--")), len(argv))])
    code_, help_ = usage(program, positional)
    assert code_ == 0 and "usage:" in help_, help_
    assert not [o for o in options if not re.search(rf"{o}\b", help_)]


def test_other_modules() -> None:
    """`python -m a.b` names a module."""
    for name in NAMES:
        for module in re.findall(r"python -m ([a-z_]+\.[a-z_.]*[a-z_])", "\n".join(code(name))):
            assert importlib.util.find_spec(module), f"{name}: {module}"


@pytest.mark.parametrize("body", marked("yaml values"))
def test_values_render(body: str, tmp_path: Path) -> None:
    """The chart takes the fragment: schemas, refusals, templates; a run in it is one that the trainer takes."""
    values = tmp_path / "values.yaml"
    values.write_text(body, encoding="utf-8")
    done = subprocess.run([charts.helm(), "template", "llm-finetune", charts.CHART, "--namespace", "llm-finetune-dev", "--values", values],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    job = yaml.load(body, Loader=HelmLoader).get("finetune-job", {})
    if "run" in job:
        trainer_config.parse({"run": job["run"], "resources": job.get("resources", {})})


def test_there_are_values() -> None:
    """The marks are found at all."""
    assert len(marked("yaml values")) >= 5 and marked("yaml run")


@pytest.mark.parametrize("body", marked("yaml run"))
def test_runs_are_accepted(body: str) -> None:
    trainer_config.parse(yaml.safe_load(body))


@pytest.mark.parametrize("name", NAMES)
def test_set_options_render(name: str) -> None:
    """Paths of `--set` are values."""
    for line in code(name):
        for path in re.findall(r"--set(?:-string)? ([\w.-]+)=", line):
            assert known(path), f"{line}: {path}"


def _inside(schema: dict[str, Any], key: str) -> dict[str, Any] | None:
    """The schema of a key, through the items of lists and the branches of conditions; None if it is not known."""
    if key == "[]":
        return schema.get("items")
    if key in schema.get("properties", {}):
        return schema["properties"][key]
    for branch in ("then", "else"):
        if branch in schema and (found := _inside(schema[branch], key)) is not None:
            return found
    extra = schema.get("additionalProperties")
    return extra if isinstance(extra, dict) and extra else None


@functools.cache
def _schema(section: str) -> dict[str, Any]:
    import json

    if section in ("run", "resources"):
        return trainer_schema.make()["properties"][section]
    if section == "global":
        return json.loads((charts.CHART / "values.schema.json").read_text(encoding="utf-8"))["properties"]["global"]
    return json.loads((charts.CHART / "charts" / section / "values.schema.json").read_text(encoding="utf-8"))


def known(path: str) -> bool:
    """Whether `section.key.key[].key` is a value of the chart or a field of a run; a last `*` stands for all keys."""
    section, *keys = path.replace("[]", ".[]").split(".")
    schema: dict[str, Any] | None = _schema(section)
    for key in keys:
        if key == "*":
            return True
        schema = _inside(schema, key) if schema is not None else None
        if schema is None:
            return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_values_are_known(name: str) -> None:
    """Every `section.key` in inline code is a value of the chart or a field of a run."""
    unknown = []
    for match in INLINE.finditer(INDENTED.sub("", FENCE.sub("", text(name)))):
        found = re.match(rf"((?:{'|'.join((*SECTIONS, 'run', 'resources'))})(?:\.(?:[\w-]+|\*)(?:\[\])?)+)(?=$|[:\s])", match[1] or "")
        if found and not re.search(r"\.(ya?ml|json|md)$", found[1]) and not known(found[1]):
            unknown.append(found[1])
    assert not unknown


def test_the_helm_command() -> None:
    """docs/first-fine-tune.md prints what `python -m tools environments helm` prints."""
    (line,) = [c for c in code("docs/first-fine-tune.md") if c.startswith("helm upgrade")]
    command = shlex.join(environments.helm_command("dev", chart="oci://registry.example.com/charts/llm-finetune"))
    assert line == command.replace(f"{REPOSITORY}/", "")


@functools.cache
def sources() -> str:
    """Programs and templates as one text, literals that are written over several lines joined."""
    parts = []
    for folder, pattern in (("tools", "*.py"), ("trainer", "*.py"), ("chatbot", "*.py"), ("charts", "*.tpl"), ("charts", "*.yaml")):
        parts += [p.read_text(encoding="utf-8") for p in sorted((REPOSITORY / folder).rglob(pattern))]
    joined = re.sub(r'(?<!\\)"\s*\n\s*f?"', "", "\n".join(parts))
    return re.sub(r'(?<!\\)" f"', "", joined)


MESSAGES = [m[1] for h in re.findall(r"^### (.+)$", text("docs/troubleshooting.md"), re.M) if (m := re.fullmatch(r"`+(.+?)`+", h))]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages(message: str) -> None:
    """A message that troubleshooting explains is one that something says."""
    for part in message.replace("`make up`", "…").split("…"):
        assert part.strip() in sources(), part


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 25
