"""Every shipped recipe loads, is planned, fits its hardware, and says in its header what plan says."""

from __future__ import annotations

import re

import jsonschema
import pytest
import yaml

from trainer import schema
from trainer.plan import plan
from trainer.plan.recipes import DIRECTORY, END, header, load, names

MODELS = ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.2-1b", "llama-3.2-3b")
METHODS = ("full", "lora", "qlora")


def test_every_model_with_every_method() -> None:
    assert {f"{m}-{k}" for m in MODELS for k in METHODS} <= set(names())


@pytest.mark.parametrize("name", names())
def test_recipe(name: str) -> None:
    config = load(name)
    text = (DIRECTORY / f"{name}.yaml").read_text(encoding="utf-8")
    jsonschema.Draft7Validator(schema.make()).validate(yaml.safe_load(text))
    assert config.run.name == name.replace(".", "-")
    assert name.startswith(config.run.model.name.split("/")[1].removesuffix("-hf").lower())
    assert config.run.method.kind in name.split("-")
    assert config.run.model.licence
    result = plan(config)
    assert result.fits is True, "\n".join(result.advice)
    assert not [line for line in result.advice if "micro_batch_tokens" in line], "a recipe takes plan's advice"
    assert result.tokens_per_second > 0 and 0.05 < result.mfu < 0.7
    assert text.split(f"{END}\n")[0] + END == "\n".join(header(result)), "python -m trainer.plan.recipes --write"


@pytest.mark.parametrize("name", names())
def test_headers_say_what_matters(name: str) -> None:
    """The header's numbers are plan's, read back from the text."""
    comment = " ".join(line.lstrip("# ") for line in (DIRECTORY / f"{name}.yaml").read_text().splitlines() if line.startswith("#"))
    result = plan(load(name), advise=False)
    found = re.search(r"Predicted: ([\d,]+) tokens/s", comment)
    assert found and int(found[1].replace(",", "")) == round(result.tokens_per_second)
    for group in result.groups:
        assert f"{group.group.workers}x {group.group.gpu.name if group.group.gpu else ''}" in comment
        assert f"{group.memory.total / 2**30:.1f} of" in comment
