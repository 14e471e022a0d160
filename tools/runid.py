"""The name of a run, as the finetune-job chart computes it.

A run is called `<run.name>-<hash>`; the hash is the first ten digits of the sha256 over the canonical JSON of

    {"image": <digest of the trainer image, or repository:tag>, "run": <the values under finetune-job.run, as written>}

Canonical is what Go's encoding/json writes, because Helm hashes that: keys sorted, no spaces, numbers in Go's form, `<`, `>`, `&` and the
two Unicode line separators escaped. Values files are read as Helm reads them, which differs from PyYAML in numbers (`1e-5` is one).

    python -m tools.runid environments/dev/release.yaml environments/dev/site.yaml environments/dev/finetune.yaml
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tools.errors import OperatorError
from tools.layout import REPOSITORY

CHART = REPOSITORY / "charts" / "llm-finetune"


class HelmLoader(yaml.SafeLoader):
    """YAML as Helm's library reads it (sigs.k8s.io/yaml): exponents need neither point nor sign, dates and times of day stay text."""


_REPLACED = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "int", "timestamp", "value")}
HelmLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_BOOL = re.compile(r"^(y|Y|yes|Yes|YES|on|On|ON|true|True|TRUE|n|N|no|No|NO|off|Off|OFF|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?(0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")


def _bool(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> bool:
    return loader.construct_scalar(node).lower() in ("y", "yes", "on", "true")


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if re.fullmatch(r"0o?[0-7]+", digits):
        return sign * int(digits.removeprefix("0").removeprefix("o") or "0", 8)
    return sign * int(digits, 0)


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node))


for _tag, _pattern, _first, _constructor in (("bool", _BOOL, "yYnNoOtTfF", _bool), ("int", _INT, "-+0123456789", _int),
                                             ("float", _FLOAT, "-+.0123456789", _float)):
    HelmLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
    HelmLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _constructor)


def read_values(path: Path) -> dict[str, Any]:
    """A values file as Helm reads it. Raises OperatorError if it is not a mapping."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), HelmLoader) or {}
    except (OSError, yaml.YAMLError) as error:
        raise OperatorError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise OperatorError(f"{path} is not a mapping of values.")
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `base` with those of `over` laid over them, as Helm does: mappings are joined, lists and single values replaced."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _number(value: float) -> str:
    """A float as Go's encoding/json writes it."""
    if math.isnan(value) or math.isinf(value):
        raise OperatorError(f"{value} cannot be part of a run.")
    if value == 0:
        return "-0" if math.copysign(1, value) < 0 else "0"
    text = repr(value)
    mantissa, _, exponent = text.partition("e")
    negative = mantissa.startswith("-")
    whole, _, fraction = mantissa.lstrip("-").partition(".")
    if fraction == "0":
        fraction = ""
    digits, point = whole + fraction, len(whole) + int(exponent or 0)
    stripped = digits.lstrip("0")
    point -= len(digits) - len(stripped)
    digits = stripped.rstrip("0")
    if 1e-6 <= abs(value) < 1e21:
        if point <= 0:
            shown = "0." + "0" * -point + digits
        elif point >= len(digits):
            shown = digits + "0" * (point - len(digits))
        else:
            shown = f"{digits[:point]}.{digits[point:]}"
    else:
        power = point - 1
        shown = digits[0] + ("." + digits[1:] if len(digits) > 1 else "")
        shown += f"e{'-' if power < 0 else '+'}{abs(power) if power < 0 else f'{power:02}'}"
    return ("-" if negative else "") + shown


def canonical(value: Any) -> str:
    """`value` (from YAML) as Go's encoding/json writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return _number(float(value))  # Helm keeps every number as a float
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
        for character in "<>&\u2028\u2029":
            text = text.replace(character, f"\\u{ord(character):04x}")
        return text
    if isinstance(value, Mapping):
        items = sorted(((k if isinstance(k, str) else canonical(k), v) for k, v in value.items()), key=lambda item: item[0])
        return "{" + ",".join(f"{canonical(k)}:{canonical(v)}" for k, v in items) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(canonical(v) for v in value) + "]"
    raise OperatorError(f"{value!r} cannot be part of a run: give text, numbers, true or false, lists and mappings, "
                        "and leave a key out instead of null.")


def image_identity(image: Mapping[str, Any]) -> str:
    """What of an image {repository, tag, digest} goes into the hash: the digest, or repository:tag."""
    return str(image.get("digest") or f"{image['repository']}:{image['tag']}")


def run_hash(image: str, run: Mapping[str, Any]) -> str:
    """First ten hexadecimal digits of the hash over image and run."""
    text = canonical({"image": image, "run": run})
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def run_id(image: str, run: Mapping[str, Any]) -> str:
    """Name of RayJob, Ray Train run and run directory."""
    return f"{run['name']}-{run_hash(image, run)}"


def of_values(files: Sequence[Path], overrides: Mapping[str, Any] | None = None) -> str:
    """Run id of an environment: its values files in the order in which Helm gets them, and values from elsewhere laid over them.

    Raises OperatorError if they hold no run.
    """
    values: dict[str, Any] = read_values(CHART / "values.yaml")
    for path in files:
        values = merge(values, read_values(path))
    values = merge(values, overrides or {})
    run = (values.get("finetune-job") or {}).get("run") or {}
    if not run.get("name"):
        raise OperatorError(f"finetune-job.run.name is not set in {', '.join(map(str, files))}: these values describe no run.")
    return run_id(image_identity(values["global"]["images"]["trainer"]), run)


if __name__ == "__main__":
    try:
        print(of_values([Path(a) for a in sys.argv[1:]]))
    except OperatorError as error:
        sys.exit(str(error))
