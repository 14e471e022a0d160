"""The umbrella chart: schemas from its values files, CRDs from the operator's Go module, packaging, pushing.

    python -m tools.charts schema            write every values.schema.json
    python -m tools.charts package DIR       package the chart (with the CRDs of KubeRay's Go module) into DIR

A values.schema.json is made from the values.yaml beside it: types come from the default values, descriptions from the comment above each
key, and a comment line that starts with `@schema` (up to the end of the comment) holds a YAML mapping with what a default cannot say:
JSON schema keywords, and these of our own:

    trainer: run|resources     the part of the trainer's schema (trainer/schema.py)
    chatbot: Config            the chatbot's configuration (chatbot/config.py)
    itemsLike: KEY             items are mappings with the keys of the sibling KEY, all optional
    itemProperties: {...}      further keys of such items
    subchart: NAME             the section of a part, which has a schema of its own
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from tools.errors import OperatorError
from tools.layout import REPOSITORY, Layout
from tools.shell import output

CHART = REPOSITORY / "charts" / "llm-finetune"
OPERATOR = CHART / "charts" / "kuberay-operator"
KUBERAY_MODULE = "github.com/ray-project/kuberay/ray-operator"
CRDS = ("ray.io_rayclusters.yaml", "ray.io_rayjobs.yaml", "ray.io_rayservices.yaml")
"""RayService is not used, but the operator's cache watches it and does not start without its CRD."""
DRAFT = "http://json-schema.org/draft-07/schema#"
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}


def helm() -> str:
    """The helm program: $HELM, the one built by `make up`, or the one in the PATH. Raises OperatorError if there is none."""
    for candidate in (os.environ.get("HELM"), str(Layout().helm), shutil.which("helm")):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise OperatorError("helm was not found. Run `make up` once (it builds helm), install Helm 4, or set HELM to the program.")


# --- schemas


def _comments(lines: list[str], line: int) -> tuple[str, dict[str, Any]]:
    """Description and @schema mapping of the comment that ends above `line` (0-based)."""
    found: list[str] = []
    while line > 0 and (text := lines[line - 1].strip()).startswith("#"):
        found.insert(0, text[1:].strip())
        line -= 1
    at = next((i for i, text in enumerate(found) if text.startswith("@schema")), len(found))
    hints = yaml.safe_load(" ".join(found[at:]).removeprefix("@schema") or "{}")
    return " ".join(found[:at]), hints


def _of_dataclass(kind: Any) -> dict[str, Any]:
    """JSON schema of a configuration dataclass by its types alone: keys, types, choices."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        properties = {field.name: _of_dataclass(hints[field.name]) for field in dataclasses.fields(kind)}
        return {"type": "object", "additionalProperties": False, "properties": properties}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is list:
        return {"type": "array", "items": _of_dataclass(args[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of_dataclass(args[1])}
    return {} if kind is Any else {"type": {int: "integer", float: "number", str: "string", bool: "boolean"}[kind]}


def _own_keywords(hints: dict[str, Any], siblings: dict[str, Any], where: str) -> dict[str, Any]:
    """The @schema mapping with our own keywords replaced by JSON schema's."""
    hints = dict(hints)
    if part := hints.pop("trainer", None):
        from trainer import schema as trainer_schema
        hints.update({"type": "object", **trainer_schema.make()["properties"][part]})
        if part == "run":  # an empty run is told by the chart, with what to do about it
            hints = {"if": {"maxProperties": 0}, "then": {"type": "object"}, "else": hints}
    if part := hints.pop("chatbot", None):
        from chatbot import config as chatbot_config
        hints.update(_of_dataclass(getattr(chatbot_config, part)))
    if like := hints.pop("itemsLike", None):
        item = copy.deepcopy(siblings[like])
        item["properties"] = {**hints.pop("itemProperties", {}), **item["properties"]}
        item.update({"required": hints.pop("required", [])})
        item.pop("description", None)
        _drop(item, "default")
        hints["items"] = item
    if hints.pop("subchart", None):
        hints.update({"type": "object", "additionalProperties": True, "required": ["enabled"],
                      "properties": {"enabled": {"type": "boolean", "description": "Whether this part is installed."}}})
    if not hints.get("type", "x"):
        raise OperatorError(f"{where}: @schema with an empty type.")
    return hints


def _drop(schema: Any, keyword: str) -> None:
    """Remove a keyword everywhere in a schema."""
    if isinstance(schema, dict):
        if not isinstance(schema.get(keyword), dict) or keyword == "default":
            schema.pop(keyword, None)
        for value in schema.values():
            _drop(value, keyword)


def _of_mapping(node: yaml.MappingNode, lines: list[str], where: str) -> dict[str, Any]:
    """Schema of a mapping of a values file: closed, every key described."""
    properties: dict[str, Any] = {}
    for key, value in node.value:
        name, place = key.value, f"{where}{key.value}"
        description, hints = _comments(lines, key.start_mark.line)
        if not description:
            raise OperatorError(f"{place} has no comment that describes it (line {key.start_mark.line + 1}).")
        default = yaml.SafeLoader("").construct_object(value, deep=True) if not isinstance(value, yaml.MappingNode) else None
        hints = _own_keywords(hints, properties, place)
        schema: dict[str, Any] = {"description": description}
        if isinstance(value, yaml.MappingNode):
            if not hints and not value.value:
                raise OperatorError(f"{place} is an empty mapping: say with @schema what may be in it.")
            schema["type"] = "object"
            if not hints:
                schema.update(_of_mapping(value, lines, f"{place}."))
        elif default is not None:
            schema["type"] = TYPES[type(default)]
            if isinstance(default, list) and "items" not in hints:
                raise OperatorError(f"{place} is a list: say with @schema {{items: ...}} what may be in it.")
            if not isinstance(default, list):
                schema["default"] = default
        if "enum" in hints or "if" in hints:
            schema.pop("type", None)
        properties[name] = {**schema, **{k: v for k, v in hints.items() if k != "description"}}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def schema_of(values: Path) -> dict[str, Any]:
    """JSON schema (draft-07) of a values file. Raises OperatorError at a key that is not described or whose type is not known."""
    text = values.read_text(encoding="utf-8")
    root = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    schema = _of_mapping(root, text.splitlines(), "")
    if values.parent != CHART:
        schema["properties"]["global"] = {"description": "What the parts share; see the umbrella's schema.", "type": "object"}
    return {"$schema": DRAFT, "title": f"Values of {values.parent.name}", **schema}


def values_files() -> list[Path]:
    """Values files of the umbrella and its parts."""
    return [CHART / "values.yaml", *sorted(CHART.glob("charts/*/values.yaml"))]


def schema_text(values: Path) -> str:
    """Contents of the values.schema.json beside a values file."""
    return json.dumps(schema_of(values), indent=1, ensure_ascii=False) + "\n"


def write_schemas() -> list[Path]:
    """Write every values.schema.json; returns those that changed."""
    changed = []
    for values in values_files():
        path, text = values.with_name("values.schema.json"), schema_text(values)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


# --- packages


def kuberay_module() -> Path:
    """Directory of KubeRay's Go module, at the version that the operator is built from. Downloads it if need be."""
    answer = output(["go", "mod", "download", "-json", f"{KUBERAY_MODULE}@v{kuberay_version()}"], timeout=600)
    return Path(json.loads(answer)["Dir"])


def kuberay_version() -> str:
    """KubeRay's version: appVersion of the operator's chart."""
    return str(yaml.safe_load((OPERATOR / "Chart.yaml").read_text(encoding="utf-8"))["appVersion"])


def copy_crds(go_module_dir: Path) -> list[Path]:
    """Copy the operator's CRDs out of its Go module into the chart's crds/ (ignored by git); returns the copies.

    Raises OperatorError if the directory is not KubeRay's module of the chart's version.
    """
    source = go_module_dir / "config" / "crd" / "bases"
    if not go_module_dir.name.endswith(f"@v{kuberay_version()}"):
        raise OperatorError(f"{go_module_dir} is not {KUBERAY_MODULE} {kuberay_version()}, the version of {OPERATOR / 'Chart.yaml'}.")
    target = OPERATOR / "crds"
    target.mkdir(exist_ok=True)
    for old in target.glob("*.yaml"):
        if old.name not in CRDS:
            old.unlink()
    copies = []
    for name in CRDS:
        if not (source / name).is_file():
            raise OperatorError(f"{source / name} is missing; {go_module_dir} is not a whole copy of KubeRay's module.")
        copies.append(target / name)
        copies[-1].write_text(_kept((source / name).read_text()))
        copies[-1].chmod(0o644)
    return copies


def _kept(crd: str) -> str:
    """A CRD that Argo CD does not delete when the operator is switched off: all RayClusters and RayJobs of the cluster would go with it."""
    first = "\nmetadata:\n  annotations:\n"
    if crd.count(first) != 1:
        raise OperatorError("A CRD of KubeRay has no annotations any more; see tools/charts.py.")
    return crd.replace(first, f"{first}    argocd.argoproj.io/sync-options: Prune=false\n")


def package(version: str, destination: Path) -> Path:
    """Package the umbrella chart as `version` into `destination`; returns the archive. The CRDs must have been copied."""
    if not re.fullmatch(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?", version):
        raise OperatorError(f"{version} is not a semantic version. Give one, for example 0.1.0.")
    missing = [name for name in CRDS if not (OPERATOR / "crds" / name).is_file()]
    if missing:
        raise OperatorError(f"{OPERATOR / 'crds'} lacks {', '.join(missing)}. Run `make charts`, which copies them from KubeRay's module.")
    destination.mkdir(parents=True, exist_ok=True)
    output([helm(), "package", CHART, "--version", version, "--destination", destination])
    return destination / f"llm-finetune-{version}.tgz"


def push(registry: str, archive: Path, plain_http: bool = False) -> str:
    """Push a packaged chart to `oci://<registry>`; returns its reference with the digest that the registry has computed."""
    command = [helm(), "push", str(archive), f"oci://{registry.removeprefix('oci://')}", *(["--plain-http"] if plain_http else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OperatorError(f"{' '.join(command)} failed: {done.stderr.strip()[-1000:]}")
    text = done.stdout + done.stderr
    pushed, digest = re.search(r"Pushed: (\S+)", text), re.search(r"Digest: (sha256:[0-9a-f]{64})", text)
    if not pushed or not digest:
        raise OperatorError(f"helm push said neither what it pushed nor its digest: {text.strip()[-500:]}")
    return f"{pushed[1]}@{digest[1]}"


def main(arguments: list[str]) -> int:
    match arguments:
        case ["schema"]:
            for path in write_schemas():
                print(f"wrote {path.relative_to(REPOSITORY)}")
        case ["package", directory]:
            copy_crds(kuberay_module())
            version = str(yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))["version"])
            print(package(version, Path(directory)))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OperatorError as error:
        sys.exit(str(error))
