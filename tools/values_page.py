"""docs/values.md: every value of the chart with its default, what it may be and what it does, from the schemas of the values files.

    python -m tools.values_page          write docs/values.md (a test holds it to the values files)

The values files are the one source: tools/charts.py makes the schemas from them, and this page from the schemas.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tools import charts
from tools.layout import REPOSITORY

PAGE = REPOSITORY / "docs" / "values.md"
HEAD = """# Values of the chart

Made from the comments in `charts/llm-finetune/values.yaml` and `charts/llm-finetune/charts/<part>/values.yaml` by
`python -m tools.values_page`; the charts' JSON schemas are made from the same files. What Helm refuses beyond types and bounds is in the
templates (`fail`), each with the value's name and what to do.

A bold row is a mapping of the rows below it. Fields of a run (`finetune-job.run`, `finetune-job.resources`) are printed by
`python -m trainer schema`; those of the chatbot's configuration (`chatbot.config`) are in `chatbot/config.py`.
"""
ELSEWHERE = {("finetune-job", "run"), ("finetune-job", "resources"), ("chatbot", "config")}
"""Mappings whose fields are described where their programs read them."""

WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true` or `false`", "array": "list",
         "object": "mapping"}


def cell(text: str) -> str:
    """Text for a cell of a Markdown table; `<` would begin a tag outside of code."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


def code(value: Any) -> str:
    """A value as YAML writes it in one line, as code."""
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return cell(f"`{text}`")


def allowed(schema: dict[str, Any]) -> str:
    """Type and bounds in words."""
    if "enum" in schema:
        return ", ".join(code(choice) for choice in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(allowed(branch) for branch in schema["anyOf"])
    if "const" in schema:
        return code(schema["const"])
    parts = [WORDS[schema["type"]]] if schema.get("type") in WORDS else []
    keys = schema.get("items", {}).get("properties", {})
    if 0 < len(keys) <= 8:
        parts.append("each with " + ", ".join(code(key) for key in keys))
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None or high is not None:
        parts.append(f"{low} to {high}" if None not in (low, high) else f"from {low}" if high is None else f"up to {high}")
    if "pattern" in schema:
        parts.append(f"like {code(schema['pattern'])}")
    if schema.get("minLength") == 1:
        parts.append("not empty")
    return ", ".join(parts)


def rows(schema: dict[str, Any], defaults: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Rows of a mapping's values, in the order of the values file."""
    for name, value in schema["properties"].items():
        place = (*path, name)
        if place == (path[0], "global") or "description" not in value:
            continue
        default = defaults.get(name) if isinstance(defaults, dict) else None
        text = cell(value["description"])
        if "properties" in value and place not in ELSEWHERE:
            yield f"| **`{'.'.join(place)}`** | | | {text} |"
            yield from rows(value, default, place)
        else:
            kind = "mapping" if place in ELSEWHERE else allowed(value)
            yield f"| `{'.'.join(place)}` | {code(default)} | {kind} | {text} |"


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for file in charts.values_files():
        umbrella = file.parent == charts.CHART
        schema, defaults = charts.schema_of(file), yaml.safe_load(file.read_text(encoding="utf-8"))
        section = "global" if umbrella else file.parent.name
        if umbrella:
            schema, defaults = schema["properties"]["global"], defaults["global"]
        about = schema.get("description") or yaml.safe_load((file.parent / "Chart.yaml").read_text(encoding="utf-8"))["description"]
        parts.append(f"## {section}\n{about.rstrip('.')}.\n\n| value | default | may be | what it does |\n|---|---|---|---|\n"
                     + "\n".join(rows(schema, defaults, (section,))) + "\n")
    return "\n".join(parts)


def main(path: Path = PAGE) -> int:
    path.write_text(page(), encoding="utf-8")
    print(f"wrote {path.relative_to(REPOSITORY)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
