"""The generated schema and the configuration's own checks say the same."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import jsonschema
import pytest
import yaml

from trainer import config, schema
from trainer.errors import ConfigError

MINIMAL: dict[str, Any] = {"run": {"name": "a", "model": {"path": "models/m"}, "data": {"sample": True}}, "resources": {}}
VALIDATOR = jsonschema.Draft7Validator(schema.make())


def fields() -> list[tuple[str, dict[str, Any]]]:
    """Every leaf of the schema: its place (run.train.epochs) and its schema."""
    found: list[tuple[str, dict[str, Any]]] = []

    def walk(node: dict[str, Any], where: str) -> None:
        for name, field in node["properties"].items():
            place = f"{where}.{name}" if where else name
            walk(field, place) if "properties" in field else found.append((place, field))

    walk(schema.make(), "")
    return found


def document(place: str, value: Any) -> dict[str, Any]:
    """MINIMAL with one value set."""
    result = copy.deepcopy(MINIMAL)
    node = result
    *parents, last = place.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return result


def accepted(value: dict[str, Any]) -> tuple[bool, str]:
    """Whether the trainer takes the document, and the field of its complaint."""
    try:
        config.parse(value)
    except ConfigError as error:
        return False, error.field
    return True, ""


def test_is_a_schema_and_complete() -> None:
    jsonschema.Draft7Validator.check_schema(schema.make())
    assert json.loads(schema.text()) == schema.make()
    everything = config.to_dict(config.parse(MINIMAL))
    VALIDATOR.validate({k: everything[k] for k in ("run", "resources")})
    for place, field in fields():
        assert field["description"].endswith((".", ")")), place
        assert "\n" not in field["description"], place


@pytest.mark.parametrize(("place", "field"), fields(), ids=lambda v: v if isinstance(v, str) else "")
def test_ranges_are_the_trainers(place: str, field: dict[str, Any]) -> None:
    """A value just outside a limit is refused by both, naming the field; one of the wrong type too."""
    for keyword, outside in (("minimum", -1), ("exclusiveMinimum", 0), ("maximum", 1), ("exclusiveMaximum", 0)):
        if keyword in field:
            bad = document(place, field[keyword] + outside)
            assert not VALIDATOR.is_valid(bad), (keyword, bad)
            ok, complaint = accepted(bad)
            assert not ok and complaint == place, (keyword, complaint)
    for wrong in ({"a": 1} if field.get("type") != "object" else 3, [["x"]]):
        assert not VALIDATOR.is_valid(document(place, wrong)), wrong
        assert accepted(document(place, wrong))[0] is False, wrong


@pytest.mark.parametrize(("place", "field"), [f for f in fields() if "enum" in f[1]], ids=lambda v: v if isinstance(v, str) else "")
def test_choices(place: str, field: dict[str, Any]) -> None:
    bad = document(place, "no-such-choice")
    assert not VALIDATOR.is_valid(bad)
    assert accepted(bad) == (False, place)


@pytest.mark.parametrize("text", ["1e-5", "1.0e-05", "0.00001", "1e-05"])
def test_numbers_as_yaml_and_helm_write_them(text: str) -> None:
    value = yaml.safe_load(f"rate: {text}")["rate"]
    good = document("run.train.learning_rate", value)
    VALIDATOR.validate(good)
    assert config.parse(good).run.train.learning_rate == 1e-5
    VALIDATOR.validate(document("run.train.learning_rate", 1e-5))
    VALIDATOR.validate(document("resources.workers", 2.0))  # Helm's numbers are float64
    assert config.parse(document("resources.workers", 2.0)).resources.workers == 2
    assert not VALIDATOR.is_valid(document("run.train.learning_rate", "fast"))
    assert not VALIDATOR.is_valid(document("resources.workers", 2.5))


def test_unknown_and_missing_fields() -> None:
    for place in ("run.trian", "run.train.lr", "resources.gpu_count"):
        assert not VALIDATOR.is_valid(document(place, 1))
        assert accepted(document(place, 1)) == (False, place)
    for name in ("name", "model", "data"):
        short = copy.deepcopy(MINIMAL)
        del short["run"][name]
        assert not VALIDATOR.is_valid(short)
        assert accepted(short) == (False, f"run.{name}")


def test_every_class_has_docstrings() -> None:
    texts = schema.descriptions()
    for kind in vars(config).values():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            assert texts[kind.__name__][""]
            assert {f.name for f in dataclasses.fields(kind)} <= set(texts[kind.__name__]), kind


def test_example_is_the_default() -> None:
    """The commented YAML parses to the defaults once the required fields are filled."""
    value = yaml.safe_load(schema.example())
    value["run"].update(name="a")
    value["run"]["model"]["path"] = "models/m"
    value["run"]["data"]["sample"] = True
    assert config.parse(value) == config.parse(MINIMAL)
