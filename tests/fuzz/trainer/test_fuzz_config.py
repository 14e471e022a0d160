"""Whatever stands in a run's configuration: it is a configuration, or an error that names field, value and remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.cases import JSON, cases, changed, damaged, message
from trainer import config
from trainer.errors import ConfigError

RECIPES = [yaml.safe_load(path.read_text()) for path in sorted((Path(config.__file__).parent / "recipes").glob("*.yaml"))]
FULL = config.to_dict(config.parse({
    "storage": "/storage", "id": "a-0123456789", "run": {"name": "a", "model": {"path": "m", "architecture": {"hidden_size": 8}},
                                                         "data": {"path": "rows.jsonl", "columns": {"id": "pmid"}}},
    "resources": {"workers": 2, "groups": [{"name": "x", "workers": 2}]}}))
DOCUMENTS = st.sampled_from([FULL, FULL, {"run": FULL["run"]}, *RECIPES])


def refused(error: ConfigError) -> None:
    assert error.field and message(error).startswith(f"{error.field}: ") and error.remedy.strip()


def read(path: Path, content: bytes) -> config.Config | None:
    """The file's configuration, or None if it is refused as it should be."""
    path.write_bytes(content)
    try:
        made = config.load(str(path))
    except ConfigError as error:
        return refused(error)
    # What is accepted can be written to run.yaml and is read back as the same; it has a hash.
    document = config.to_dict(made)
    assert config.parse(yaml.safe_load(yaml.safe_dump(document, allow_unicode=True))) == made
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    return made


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "run.yaml"


@cases(400)
@given(document=changed(DOCUMENTS), form=st.sampled_from(("json", "yaml")))
def test_changed_documents(file: Path, document: Any, form: str) -> None:
    read(file, json.dumps(document).encode() if form == "json" else yaml.safe_dump(document).encode())


@cases(200)
@given(content=st.one_of(st.binary(max_size=60), damaged(DOCUMENTS.map(lambda d: yaml.safe_dump(d).encode())), JSON.map(
    lambda v: json.dumps(v).encode())))
def test_damaged_texts(file: Path, content: bytes) -> None:
    read(file, content)


@cases(100)
@given(text=st.text(max_size=60).filter(lambda t: "\x00" not in t))
@example("\ud800")
def test_environment(text: str) -> None:
    try:
        os.environ["FUZZ_RUN"] = text
    except UnicodeEncodeError:
        os.environb[b"FUZZ_RUN"] = text.encode("utf-8", "surrogatepass")
    with pytest.raises(ConfigError):  # no text of this length is a whole configuration
        config.load("env:FUZZ_RUN")
