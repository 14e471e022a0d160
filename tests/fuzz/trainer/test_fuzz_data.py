"""Whatever bytes a dataset holds: rows are kept or rejected with a reason, each once, or the file is refused by a named error."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.cases import JSON, TEXTS, cases, changed, damaged, message
from tests.trainer.conftest import _tokenizer
from trainer.config import DataConfig
from trainer.data.formats import template
from trainer.data.parts import PartMaker, Settings, arrays_of, names
from trainer.data.readers import Chunk, RawRow, open_source, read
from trainer.data.rows import Reject, Row, normalise
from trainer.errors import UserError
from trainer.model.tokenizer import save_rust, with_format

GOOD = [{"id": f"g{i}", "question": f"Does remedy {i} help?", "context": ["Trial.", f"It had {i} arms."], "answer": f"Remedy {i} helped.",
         "decision": ("yes", "no", "maybe")[i % 3]} for i in range(6)]
FLAT = [{**row, "context": " ".join(row["context"])} for row in GOOD]
PUBLISHED = {row["id"]: {"QUESTION": row["question"], "CONTEXTS": row["context"], "LONG_ANSWER": row["answer"],
                         "final_decision": row["decision"]} for row in GOOD}


def written(form: str) -> bytes:
    """The rows in a form."""
    if form == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(FLAT[0]))
        writer.writeheader()
        writer.writerows(FLAT)
        return out.getvalue().encode()
    if form.startswith("parquet"):
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(GOOD), buffer, compression=form.partition(" ")[2] or "none", row_group_size=4)
        return buffer.getvalue()
    if form == "jsonl":
        return b"".join(json.dumps(row).encode() + b"\n" for row in GOOD)
    return json.dumps(PUBLISHED if form == "json published" else GOOD).encode()


FORMS = ("jsonl", "json", "json published", "csv", "parquet none", "parquet snappy", "parquet zstd")
FILES = {form: written(form) for form in FORMS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def maker(folder: Path) -> PartMaker:
    tokenizer = with_format(_tokenizer(), "chat")
    save_rust(tokenizer, folder / "tokenizer.json")
    special = tuple(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return PartMaker(Settings(directory=str(folder), tokenizer_file=str(folder / "tokenizer.json"), template=template("chat", tokenizer),
                              special_ids=special, columns={}, context=True, decision=True, max_tokens=64, test_share=0.2, seed=1,
                              near_duplicates=0.8))


def rows_of(path: Path) -> list[RawRow]:
    """All rows of a file, as `prepare` reads them. Raises UserError."""
    source = open_source(DataConfig(path=path.name), path.parent)
    return [row for chunk in source.chunks() for row in read(chunk)]


@cases(600)
@given(content=st.sampled_from(FORMS).flatmap(lambda form: st.tuples(st.just(form), damaged(st.just(FILES[form])))))
def test_damaged_files(folder: Path, content: tuple[str, bytes]) -> None:
    form, data = content
    path = folder / f"rows.{form.split()[0]}"
    path.write_bytes(data)
    try:
        rows = rows_of(path)
    except UserError as error:
        message(error)
        return
    for row in rows:
        made = normalise(row, {})
        assert row.where and isinstance(made, Row | Reject)
        if isinstance(made, Reject):
            assert made.reason and len(made.snippet) < 2000 and json.dumps(made.snippet).encode()
        else:
            assert made.question and made.answer and "\n".join((made.id, made.question, made.context, made.answer)).encode()


@cases(200)
@given(name=st.sampled_from(("rows.jsonl", "rows.json", "rows.csv", "rows.parquet")), data=st.binary(max_size=200))
def test_any_bytes(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    try:
        for row in rows_of(folder / name):
            normalise(row, {})
    except UserError as error:
        message(error)


@cases(300)
@given(rows=st.lists(st.one_of(changed(st.sampled_from(GOOD)), st.dictionaries(st.sampled_from(list(GOOD[0])), TEXTS | JSON)), max_size=4))
def test_any_rows(folder: Path, maker: PartMaker, rows: list[Any]) -> None:
    """Each row is kept or rejected, exactly once; what is kept fits, and its texts are UTF-8."""
    values = [row if isinstance(row, dict) else {"row": row} for row in rows]
    chunk = Chunk("rows", "rows.jsonl", 0, len(values), [RawRow(f"row {i}", value) for i, value in enumerate(values)])
    info = maker.make(0, chunk)
    assert info.rows_read == len(values) == info.rows + sum(info.rejected.values())
    arrays = arrays_of(folder, 0)
    lengths = arrays["offsets"][1:] - arrays["offsets"][:-1]
    assert len(lengths) == info.rows and (lengths <= 64).all() and (arrays["answer_start"] >= 1).all()
    assert (arrays["answer_start"] < lengths).all()
    held_out = [json.loads(line) for line in names(folder, 0)[1].read_text(encoding="utf-8").split("\n")[:-1]]
    assert len(held_out) == int(arrays["held_out"].sum())
