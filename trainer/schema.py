"""JSON schema (draft-07) of a run's `run` and `resources` parts, made from the dataclasses of trainer/config.py.

Names, types, defaults and choices come from the fields, ranges from `limited(...)`, descriptions from the docstrings below the fields,
so there is nothing to keep in step by hand. The finetune-job chart embeds the result in its values.schema.json:

    python -m trainer schema

Rules that join two fields (either `name` or `path`) are left to the trainer: a schema's answer to them does not name the field.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import typing
from functools import cache
from typing import Any, Literal

from trainer import config

NUMBER_TEXT = r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"
"""YAML 1.1 reads `1e-5` (no point) as text, YAML 1.2 and Helm as a number: a number may be either."""


@cache
def descriptions() -> dict[str, dict[str, str]]:
    """Docstrings in trainer/config.py: {class: {field: text, "": the class's own}}; paragraphs are joined to one line."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(config)).body:
        if isinstance(node, ast.ClassDef):
            texts = {"": " ".join((ast.get_docstring(node) or "").split())}
            for statement, after in zip(node.body, node.body[1:], strict=False):
                if (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and isinstance(after, ast.Expr)
                        and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)):
                    texts[statement.target.id] = " ".join(inspect.cleandoc(after.value.value).split())
            found[node.name] = texts
    return found


def of_type(kind: Any, limits: dict[str, float]) -> dict[str, Any]:
    """Schema of one type; `limits` are its JSON schema range keywords."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return of_class(typing.cast(type, kind))
    if origin is Literal:
        return {"enum": list(args)}
    if origin is list:
        return {"type": "array", "items": of_type(args[0], {})}
    if origin is dict:
        return {"type": "object", "additionalProperties": of_type(args[1], {})}
    if kind is Any:
        return {}
    if kind is float:
        return {"type": ["number", "string"], "pattern": NUMBER_TEXT, **limits}
    return {"type": {int: "integer", str: "string", bool: "boolean"}[kind], **limits}


def of_class(kind: type) -> dict[str, Any]:
    """Schema of a configuration dataclass; nothing beside its fields is allowed."""
    hints, texts = typing.get_type_hints(kind), descriptions()[kind.__name__]
    properties: dict[str, Any] = {}
    required = []
    for field in dataclasses.fields(kind):
        schema = of_type(hints[field.name], field.metadata.get("limits", {}))
        if field.default is not dataclasses.MISSING:
            schema["default"] = field.default
        elif field.default_factory is dataclasses.MISSING:
            required.append(field.name)
        elif not dataclasses.is_dataclass(hints[field.name]):
            schema["default"] = field.default_factory()
        properties[field.name] = {"description": texts[field.name], **{k: v for k, v in schema.items() if k != "description"}}
    schema = {"description": texts[""], "type": "object", "additionalProperties": False, "properties": properties}
    return {**schema, "required": required} if required else schema


def make() -> dict[str, Any]:
    """The schema of a document with `run` and `resources`."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Fine-tuning run",
        "type": "object",
        "properties": {"run": of_class(config.RunConfig), "resources": of_class(config.ResourcesConfig)},
        "required": ["run"],
    }


def text() -> str:
    """The schema as it is printed and embedded."""
    return json.dumps(make(), indent=2, ensure_ascii=False) + "\n"


def example() -> str:
    """Every field of `run` and `resources` with its default and description, as commented YAML (for values files and docs)."""
    lines: list[str] = []

    def put(schema: dict[str, Any], indent: int) -> None:
        for name, field in schema["properties"].items():
            pad = "  " * indent
            lines.extend(textwrap.wrap(field["description"], 110, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# "))
            if "properties" in field:
                lines.append(f"{pad}{name}:")
                put(field, indent + 1)
            else:
                lines.append(f"{pad}{name}: {json.dumps(field.get('default', ''))}")

    put(make(), 0)
    return "\n".join(lines) + "\n"
