"""The environments: three values files each, checked so that a wrong one is named with its file and line.

    release.yaml   what is promoted: chart version, image pins, served run
    site.yaml      what the place is: storage, node groups, GPUs, ingress, Secrets by name
    finetune.yaml  what is trained: the run and its resources

`make lint` runs `check()`. Helm checks the merged values again when it renders, so nothing depends on this having been run.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from tools.errors import OperatorError
from tools.layout import REPOSITORY, Layout
from tools.runid import HelmLoader
from tools.secrets_check import Finding, scan
from trainer import config as trainer_config
from trainer.errors import ConfigError, UserError
from trainer.evaluate import gate as gates

FOLDER = "environments"
EXAMPLES = "docs/examples"
"""Worked examples: environments that no cluster names, checked like the others."""
ORDER = ("site.yaml", "finetune.yaml", "release.yaml")
"""Values files in the order in which Helm and the ApplicationSet read them; the later wins."""
CHART = Path("charts/llm-finetune")
RELEASE_NAME = "llm-finetune"
NAME = re.compile(r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$")
"""`llm-finetune-<name>` names a namespace, so 63 characters in all."""

Path_ = tuple[str | int, ...]


@dataclass
class Document:
    """A YAML file with the line of every key and item."""

    path: Path
    value: Any = None
    lines: dict[Path_, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def line(self, path: Sequence[str | int]) -> int:
        """Line of a place in the file, or of the nearest that encloses it."""
        keys = tuple(path)
        while keys and keys not in self.lines:
            keys = keys[:-1]
        return self.lines.get(keys, 1)


def read(path: Path) -> Document:
    """A values file; what is not YAML, or a key given twice (of which Helm would silently take the last), is a finding."""
    document = Document(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        document.findings.append(Finding(path, 1, "The file is missing. Every environment has release.yaml, site.yaml and finetune.yaml."))
        return document
    try:
        root = yaml.compose(text, Loader=HelmLoader)
        if root is not None:
            document.value = yaml.load(text, Loader=HelmLoader)
            _index(root, (), document)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        document.findings.append(Finding(path, mark.line + 1 if mark else 1, f"Not valid YAML: {getattr(error, 'problem', None) or error}"))
        return document
    if not isinstance(document.value, dict):
        document.findings.append(Finding(path, 1, "The file must be a mapping of chart values."))
        document.value = None
    return document


def _index(node: yaml.Node, path: Path_, document: Document) -> None:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*path, key.value)
            if place in document.lines:
                document.findings.append(Finding(document.path, key.start_mark.line + 1,
                                                 f"{dotted(place)} is given twice (first in line {document.lines[place]}). Keep one."))
            document.lines[place] = key.start_mark.line + 1
            _index(value, place, document)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _index(value, (*path, index), document)


def dotted(path: Sequence[str | int]) -> str:
    """A place as a user writes it: global.images.trainer.digest, ray-cluster.workerGroups[0].gpus."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the file"


def merge(base: Any, over: Any) -> Any:
    """Values as Helm merges them: mappings key by key, everything else replaced; null removes a key."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return copy.deepcopy(over)
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every place that holds no mapping."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


@dataclass(frozen=True)
class Environment:
    """One folder of environments/, read."""

    name: str
    documents: Mapping[str, Document]

    @property
    def values(self) -> dict[str, Any]:
        """The three files merged."""
        merged: Any = {}
        for name in ORDER:
            merged = merge(merged, self.documents[name].value or {})
        return dict(merged)

    @property
    def chart_version(self) -> str:
        return str(self.documents["release.yaml"].value["global"]["release"]["chart"]["version"])

    @property
    def namespace(self) -> str:
        return namespace(self.name)

    @property
    def folder(self) -> Path:
        return self.documents["release.yaml"].path.parent

    def setter(self, path: Sequence[str | int]) -> tuple[Document, int] | None:
        """File and line that set a place of the merged values (or what encloses it, if nothing set it); None if no file did."""
        keys = tuple(path)
        while keys:
            for name in reversed(ORDER):
                if keys in self.documents[name].lines:
                    return self.documents[name], self.documents[name].lines[keys]
            keys = keys[:-1]
        return None


def namespace(environment: str) -> str:
    """Namespace of an environment; the ApplicationSet says the same."""
    return f"llm-finetune-{environment}"


def names(root: Path = REPOSITORY) -> list[str]:
    """Folders of environments/, sorted."""
    return sorted(p.name for p in (root / FOLDER).iterdir() if p.is_dir() and p.name != "schema")


def examples(root: Path = REPOSITORY) -> list[str]:
    """The worked examples as `load` takes them: docs/examples/<name>, sorted."""
    return sorted(p.relative_to(root).as_posix() for p in (root / EXAMPLES).glob("*/") if p.is_dir())


def load(name: str, root: Path = REPOSITORY) -> Environment:
    """Read an environment: a folder's name below environments/, or a path with a slash from the checkout's root (docs/examples/...).

    Raises OperatorError if there is no such folder.
    """
    folder = root / name if "/" in name else root / FOLDER / name
    if not folder.is_dir():
        raise OperatorError(f"There is no environment {name!r}. Use one of: {', '.join([*names(root), *examples(root)])}.")
    return Environment(folder.name, {f: read(folder / f) for f in ORDER})


def read_schema(file: str, root: Path = REPOSITORY) -> dict[str, Any]:
    """JSON schema of one of the three files."""
    return dict(json.loads((root / FOLDER / "schema" / f"{Path(file).stem}.json").read_text(encoding="utf-8")))


def check(root: Path = REPOSITORY) -> list[Finding]:
    """Everything wrong with the environments of a checkout."""
    findings = []
    schemas = {f: read_schema(f, root) for f in ORDER}
    for name in [*names(root), *examples(root)]:
        findings += check_environment(load(name, root), schemas, root)
    return findings + scan(root, [folder for folder in (FOLDER, EXAMPLES) if (root / folder).is_dir()])


def check_environment(environment: Environment, schemas: Mapping[str, Any], root: Path = REPOSITORY) -> list[Finding]:
    """The environment's files against their schemas, the trainer's and the charts'; later checks need the earlier ones passed."""
    findings = [f for d in environment.documents.values() for f in d.findings]
    if not NAME.fullmatch(environment.name):
        findings.append(Finding(environment.folder, 1, "The folder names a namespace: use 1 to 40 lower-case letters, digits "
                                                                     "and '-', starting with a letter and not ending with '-'."))
    for file, document in environment.documents.items():
        if document.value is not None:
            findings += validate(document.value, schemas[file], lambda p, d=document: (d, d.line(p)))
    if findings:
        return findings
    findings += _gate(environment.folder / "gate.yaml")
    findings += _set_once(environment)
    findings += _served(environment)
    findings += _run(environment)
    if not findings:
        findings += _chart(environment, root)
    return findings


def _gate(path: Path) -> Iterator[Finding]:
    """The thresholds of promotions into this environment, if it has its own."""
    if path.is_file():
        try:
            gates.load_gate(path)
        except UserError as error:
            yield Finding(path, 1, str(error))


def validate(value: Any, schema: Mapping[str, Any], place: Any, section: str = "") -> list[Finding]:
    """JSON schema errors as findings. `place(path)` gives the document and line; `section` is where `value` stands in the file."""
    findings = []
    validator = jsonschema.Draft7Validator(schema)

    def name(path: Sequence[str | int]) -> str:
        return dotted([section, *path] if section and path[:1] != ["global"] else path)

    for error in sorted(validator.iter_errors(value), key=lambda e: [str(p) for p in e.absolute_path]):
        path = list(error.absolute_path)
        if error.validator == "additionalProperties" and isinstance(error.instance, dict):
            known = set(error.schema.get("properties", {}))
            for key in sorted(set(error.instance) - known):
                document, line = place([*path, key])
                names_ = f"Known: {', '.join(sorted(known))}." if known else "Nothing is allowed here."
                findings.append(Finding(document.path, line, f"{name([*path, key])} is not known here. {names_}"))
            continue
        document, line = place(path)
        if error.validator == "not" and error.schema.get("not") == {}:
            text = f"{name(path)} does not belong into this file: {error.schema.get('description', 'remove it')}."
        else:
            shown = json.dumps(error.instance, ensure_ascii=False)
            text = f"{name(path)}: {error.message if len(error.message) < 300 else 'not usable: ' + shown[:120]}"
            if hint := error.schema.get("description"):
                text += f" ({hint})"
        findings.append(Finding(document.path, line, text))
    return findings


def _set_once(environment: Environment) -> Iterator[Finding]:
    """A value that two files set would be decided by an order that nobody looks up."""
    seen: dict[Path_, str] = {}
    for file in ORDER:
        document = environment.documents[file]
        for path, _ in leaves(document.value):
            if path in seen:
                yield Finding(document.path, document.line(path), f"{dotted(path)} is also set in {seen[path]}. Keep one of the two.")
            seen[path] = file


def _served(environment: Environment) -> Iterator[Finding]:
    release = environment.documents["release.yaml"]
    serve = release.value["chatbot"].get("config", {}).get("serve", {})
    if serve.get("follow") == "latest" and "run" in serve:
        yield Finding(release.path, release.line(("chatbot", "config", "serve", "follow")),
                      "serve.follow: latest and serve.run contradict each other. Follow the latest run or name one.")


def _run(environment: Environment) -> Iterator[Finding]:
    """The run as the trainer reads it: wrong combinations too, which no JSON schema says."""
    document = environment.documents["finetune.yaml"]
    job = document.value["finetune-job"]
    if "run" not in job:
        return
    try:
        trainer_config.parse({"run": job["run"], "resources": job.get("resources", {})})
    except ConfigError as error:
        path: list[str | int] = ["finetune-job"]
        for part in re.findall(r"[^.\[\]]+", error.field):
            path.append(int(part) if part.isdigit() else part)
        yield Finding(document.path, document.line(path), str(error))


def chart_values(root: Path = REPOSITORY) -> dict[str, Any]:
    """The chart's defaults, those of the subcharts below their names (as Helm puts them together)."""
    values: Any = {}
    for chart in sorted((root / CHART / "charts").iterdir()):
        file = chart / "values.yaml"
        if file.is_file():
            own = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            shared = own.pop("global", {})
            values = merge(values, {"global": shared, chart.name: own})
    umbrella = yaml.safe_load((root / CHART / "values.yaml").read_text(encoding="utf-8")) or {}
    return dict(merge(values, umbrella))


def _chart(environment: Environment, root: Path) -> Iterator[Finding]:
    """The merged values against the charts' schemas, reported where a file of the environment set the value."""
    if not (root / CHART / "values.yaml").is_file():
        return
    values = merge(chart_values(root), environment.values)
    fallback = environment.documents["site.yaml"]

    def place(prefix: Path_) -> Any:
        return lambda path: environment.setter((*prefix, *path) if path[:1] != ["global"] else path) or (fallback, 1)

    schema = root / CHART / "values.schema.json"
    if schema.is_file():
        yield from validate(values, json.loads(schema.read_text(encoding="utf-8")), place(()))
    for chart in sorted((root / CHART / "charts").iterdir()):
        schema = chart / "values.schema.json"
        own = values.get(chart.name) or {}
        if schema.is_file() and own.get("enabled", True):
            yield from validate({**own, "global": values.get("global", {})}, json.loads(schema.read_text(encoding="utf-8")),
                                place((chart.name,)), chart.name)


def helm_command(name: str, *, chart: str = "", images: str = "", root: Path = REPOSITORY, action: str = "") -> list[str]:
    """The Helm command that makes the same objects as Argo CD does for this environment.

    `chart`: a folder, an archive or an oci:// reference (default: the chart of this checkout). `images`: file with values that stand in
    for the cluster's annotation `llm-finetune/images`. `action`: the command's first words (default: `upgrade --install`).
    """
    environment = load(name, root)
    command = ["helm", *(shlex.split(action) if action else ["upgrade", "--install", "--create-namespace", "--server-side=true"]),
               RELEASE_NAME, chart or str(root / CHART), "--namespace", environment.namespace]
    if chart.startswith("oci://"):
        command += ["--version", environment.chart_version]
    for file in ORDER:
        command += ["--values", str(environment.folder / file)]
    return [*command, "--values", images] if images else command


def main_check(_: argparse.Namespace) -> int:
    """Print the findings. Returns 1 if there is one."""
    findings = check()
    for finding in findings:
        print(finding.text(REPOSITORY))
    print(f"{len(names())} environments, {len(examples())} examples, {len(findings)} findings")
    return 1 if findings else 0


def main_helm(arguments: argparse.Namespace) -> int:
    """Print the Helm command of an environment."""
    print(shlex.join(helm_command(arguments.environment, chart=arguments.chart, images=arguments.images)))
    return 0


def add_parser(commands: Any) -> None:
    """`environments check` and `environments helm ENV`."""
    parser: argparse.ArgumentParser = commands.add_parser("environments", help="check the environments, or print the Helm command of one")
    inner = parser.add_subparsers(dest="what", required=True)
    inner.add_parser("check", help="schemas, runs, charts and secrets, with file and line").set_defaults(run=main_check)
    helm = inner.add_parser("helm", help="the helm command that makes the same objects as Argo CD")
    helm.add_argument("environment", help="its name, or the path of an example: docs/examples/<name>")
    helm.add_argument("--chart", default="", help="folder, archive or oci:// reference (default: this checkout's chart)")
    helm.add_argument("--images", default="", help="values file with global.images, for an environment whose release.yaml names none")
    helm.set_defaults(run=main_helm)


def helm_binary() -> str:
    """Our Helm if it is built, else the one on the PATH."""
    own = Layout().helm
    return str(own) if own.exists() else "helm"
