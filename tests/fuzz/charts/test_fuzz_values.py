"""Whatever stands in values.yaml: the chart renders whole objects, or refuses with a message that names the value."""

from __future__ import annotations

import copy
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import chatbot.config
import chatbot.errors
import trainer.config
import trainer.errors
from tests.charts.conftest import CHATBOT, JOB, SITES, Values, helm, join, render
from tests.fuzz.cases import JSON, SCALARS, cases, changed, message
from tools import charts

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def schema(part: str) -> dict[str, Any]:
    """The schema of a part's values (empty name: the umbrella's)."""
    directory = charts.CHART / "charts" / part if part else charts.CHART
    made: dict[str, Any] = json.loads((directory / "values.schema.json").read_text())
    return made


@cache
def validator(part: str) -> Any:
    return jsonschema.Draft7Validator(schema(part))


@cache
def sections(part: str, name: str = "") -> st.SearchStrategy[Any]:
    """Values that fit a part's schema, or one section of it."""
    return fitting(schema(part)["properties"][name] if name else schema(part))


PARTS = sorted(path.parent.name for path in Path(charts.CHART / "charts").glob("*/values.schema.json"))


def in_json(value: Any) -> bool:
    """Whether a values file in JSON can say it to helm: characters of 16 bits but surrogates, numbers of 53 bits."""
    if isinstance(value, dict):
        return all(in_json(k) and in_json(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(in_json, value))
    if isinstance(value, str):
        return not any("\ud800" <= c <= "\udfff" or c > "\uffff" for c in value)
    return not isinstance(value, int | float) or abs(value) < 2**53


def fitting(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a schema (mostly) accepts."""
    node = {**node, **node.get("else", {})}
    if "const" in node:
        return st.just(node["const"])
    if "enum" in node:
        return st.sampled_from(node["enum"])
    if "anyOf" in node:
        return st.one_of([fitting({**{k: v for k, v in node.items() if k != "anyOf"}, **choice}) for choice in node["anyOf"]])
    kinds = node.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not kinds:
        return JSON.filter(in_json)
    return st.one_of([_of_kind(kind, node) for kind in kinds])


def _of_kind(kind: str, node: dict[str, Any]) -> st.SearchStrategy[Any]:
    if kind == "object":
        known = {key: fitting(inner) for key, inner in node.get("properties", {}).items()}
        required = {key: known[key] for key in node.get("required", []) if key in known}
        given_ = st.fixed_dictionaries(required, optional={k: v for k, v in known.items() if k not in required}) if len(known) < 8 else (
            st.lists(st.sampled_from(sorted(known)), max_size=4, unique=True).flatmap(
                lambda keys: st.fixed_dictionaries({**required, **{key: known[key] for key in keys}})))
        more = node.get("additionalProperties", True)
        if not isinstance(more, dict):
            return given_
        names = st.from_regex(r"\A[A-Za-z][A-Za-z0-9_./-]{0,20}\Z")
        return st.builds(lambda a, b: {**b, **a}, given_, st.dictionaries(names, fitting(more), max_size=3))
    if kind == "array":
        return st.lists(fitting(node.get("items", {})), max_size=3)
    if kind in ("integer", "number"):
        low, high = node.get("minimum", node.get("exclusiveMinimum", -5)), node.get("maximum", node.get("exclusiveMaximum", 10**6))
        return st.integers(math.ceil(low), math.floor(high)) if kind == "integer" else st.floats(low, high)
    if kind == "string":
        texts = st.from_regex(node["pattern"]) if "pattern" in node else SCALARS.filter(lambda v: isinstance(v, str))
        return texts.filter(in_json).filter(lambda t: len(t) >= node.get("minLength", 0))
    return {"boolean": st.booleans(), "null": st.none()}[kind]


def accepts(part: str, values: Any) -> bool:
    """Whether the part's schema takes the values. Nothing but ValidationError comes of it."""
    try:
        validator(part).validate(values)
    except jsonschema.ValidationError as error:
        message(error) if len(str(error)) < 4000 else None
        return False
    return True


@cases(150)
@given(data=st.data(), part=st.sampled_from(["", *PARTS]))
def test_schemas_judge_whatever_comes(data: st.DataObject, part: str) -> None:
    values = data.draw(changed(sections(part)))
    assert accepts(part, values) in (True, False)


RUN = {"name": "a", "model": {"path": "models/m"}, "data": {"sample": True}}


@cases(250)
@given(data=st.data())
def test_trainer_and_chart_agree(data: st.DataObject) -> None:
    """What the trainer takes, the chart takes; what the chart takes, the trainer takes or refuses by name."""
    run = data.draw(changed(st.one_of(st.just(RUN), sections("finetune-job", "run").map(lambda run: {**RUN, **run}))).filter(in_json))
    resources = data.draw(changed(st.one_of(st.just({}), sections("finetune-job", "resources")), most=1).filter(in_json))
    taken = accepts("finetune-job", {"run": run, "resources": resources})
    try:
        trainer.config.parse({"run": run, "resources": resources})
    except trainer.errors.ConfigError as error:
        message(error)
    else:
        assert taken, "the trainer takes what the chart's schema refuses"


@cases(200)
@given(data=st.data())
def test_chatbot_and_chart_agree(data: st.DataObject) -> None:
    document = data.draw(changed(sections("chatbot", "config")).filter(in_json))
    taken = accepts("chatbot", {"config": document})
    try:
        chatbot.config.parse(document)
    except chatbot.errors.ConfigError as error:
        message(error)
    else:
        assert taken, "the chatbot takes what the chart's schema refuses"


@cache
def kinds() -> frozenset[str]:
    """Kinds of object that the chart makes of values that are meant."""
    return frozenset(document["kind"] for site in SITES.values() for document in render(site))


@st.composite
def sites(draw: st.DrawFn) -> Values:
    """A site with some sections replaced by other ones that fit their schemas, or by anything."""
    values: Values = copy.deepcopy(draw(st.sampled_from([{}, JOB, CHATBOT, *SITES.values()])))
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from(["global", *PARTS]))
        node = schema("")["properties"]["global"] if part == "global" else schema(part)
        path = [part]
        while node.get("properties") and (len(path) == 1 or draw(st.integers(0, 3))):
            key = draw(st.sampled_from(sorted(k for k in node["properties"] if k != "global")))
            path.append(key)
            node = node["properties"][key]
        new: Any = draw(st.one_of(fitting(node), fitting(node), fitting(node), JSON.filter(in_json)))
        for key in reversed(path):
            new = {key: new}
        values = join(values, new)
    return values


@cases(25, of_many=0.04)
@given(values=sites())
def test_helm_renders_or_refuses_by_name(values: Values) -> None:
    code, out, err = helm(values)
    if code:
        # A schema's refusal names the place; a template's own (fail, required) is helm's `execution error`. A wrong type inside a
        # template, a nil pointer or text that is not YAML would read otherwise.
        assert "don't meet the specifications of the schema" in err or "execution error at (" in err, err
        assert not any(sign in err for sign in ("nil pointer", "error calling", "YAML parse error", "wrong type for value")), err
        return
    for document in yaml.load_all(out, LOADER):
        if document:
            assert document["kind"] in kinds() and document["apiVersion"] and isinstance(document["metadata"]["name"], str)


@pytest.mark.parametrize("name", ["jsonschema"])
def test_the_schemas_are_schemas(name: str) -> None:
    for part in ("", *PARTS):
        jsonschema.Draft7Validator.check_schema(schema(part))
