"""Every accepted form gives the same rows, in chunks that cover each row once."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.config import DataConfig
from trainer.data import readers
from trainer.data.readers import SAMPLE, hub_source, open_source, read
from trainer.data.rows import Reject, Row, normalise
from trainer.errors import ConfigError, UserError

ROWS = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
EXPECTED = [Row(r["id"], r["question"], "\n".join(r["contexts"]), r["long_answer"], r["final_decision"]) for r in ROWS]


def all_rows(source: readers.Source) -> list[Row | Reject]:
    return [normalise(raw, source.columns) for chunk in source.chunks() for raw in read(chunk)]


def write(form: str, path: Path) -> dict[str, str]:
    """Write the sample in a form; returns the column map that it needs."""
    plain = [{"id": r["id"], "question": r["question"], "context": "\n".join(r["contexts"]), "answer": r["long_answer"],
              "decision": r["final_decision"]} for r in ROWS]
    hub = [{"pubid": r["id"], "question": r["question"], "context": {"contexts": r["contexts"], "labels": [], "meshes": []},
            "long_answer": r["long_answer"], "final_decision": r["final_decision"]} for r in ROWS]
    published = {r["id"]: {"QUESTION": r["question"], "CONTEXTS": r["contexts"], "LABELS": [], "MESHES": [], "YEAR": None,
                           "final_decision": r["final_decision"], "LONG_ANSWER": r["long_answer"]} for r in ROWS}
    if form == "lines":
        path.write_text("".join(json.dumps(r) + "\n" for r in plain))
    elif form == "array":
        path.write_text(json.dumps(hub, indent=2))
    elif form == "compact array":
        path.write_text(json.dumps(hub, separators=(",", ":")))
    elif form == "lines in .json":
        path.write_text("".join(json.dumps(r) + "\n" for r in hub))
    elif form == "published":
        path.write_text(json.dumps(published, indent=1))
    elif form == "published on one line":
        path.write_text(json.dumps(published))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(hub), path, row_group_size=50)
    elif form == "own columns":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["nr", "frage", "text", "antwort", "urteil"])
            writer.writerows([r["id"], r["question"], r["context"], r["answer"], r["decision"]] for r in plain)
        return {"id": "nr", "question": "frage", "context": "text", "answer": "antwort", "decision": "urteil"}
    return {}


FORMS = {"lines": "r.jsonl", "array": "r.json", "compact array": "r.json", "lines in .json": "r.json", "published": "r.json",
         "published on one line": "r.json", "parquet": "r.parquet", "own columns": "r.csv"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("small", [False, True])
def test_each_form_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, small: bool) -> None:
    if small:  # many borders between chunks, some within a row
        monkeypatch.setattr(readers, "CHUNK_BYTES", 777)
        monkeypatch.setattr(readers, "CHUNK_ROWS", 7)
    columns = write(form, tmp_path / FORMS[form])
    source = open_source(DataConfig(path=FORMS[form], columns=columns), tmp_path)
    assert all_rows(source) == EXPECTED
    assert source.official == form.startswith("published")
    assert not small or len(list(source.chunks())) > 5


@pytest.mark.parametrize("size", [1, 2, 3, 50, 51, 52, 1000])
def test_byte_ranges_cover_each_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", size)
    objects = [{"question": "q" * n, "answer": "a"} for n in (0, 5, 23, 24, 25, 1, 80)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, objects)))
    source = open_source(DataConfig(path="r.jsonl"), tmp_path)
    assert [raw.value for chunk in source.chunks() for raw in read(chunk)] == objects


def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "deep"
    folder.mkdir(parents=True)
    write("lines", tmp_path / "data" / "b.jsonl")
    write("parquet", folder / "c.parquet")
    (tmp_path / "data" / "notes.txt").write_text("not data")
    (tmp_path / "data" / ".hidden.jsonl").write_text("not data")
    assert all_rows(open_source(DataConfig(path="data"), tmp_path)) == EXPECTED * 2


def hub_layout(root: Path, columns: int = 5) -> None:
    """A local copy in the layout of the hub's qiaojin/PubMedQA: a folder a subset, parquet inside, subsets named in the card."""
    subsets = {"pqa_labeled": ROWS[:100], "pqa_artificial": ROWS[100:160], "pqa_unlabeled": ROWS[160:]}
    card = ["---", "configs:"]
    for name, rows in subsets.items():
        (root / name).mkdir(parents=True)
        card += [f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: {name}/train-*"]
        records = [{"pubid": 900 + i, "question": r["question"],
                    "context": {"contexts": r["contexts"], "labels": ["A"] * len(r["contexts"]), "meshes": ["B"],
                                "reasoning_required_pred": ["y"]},
                    "long_answer": r["long_answer"], "final_decision": r["final_decision"]} for i, r in enumerate(rows)]
        if name == "pqa_unlabeled":
            records = [{k: v for k, v in r.items() if k != "final_decision"} for r in records]
        pq.write_table(pa.Table.from_pylist(records), root / name / "train-00000-of-00001.parquet", row_group_size=1000)
    (root / "README.md").write_text("\n".join([*card, "---", "# PubMedQA"]))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub_layout(tmp_path / "qiaojin" / "PubMedQA")
    return tmp_path / "qiaojin" / "PubMedQA"


def test_hub_layout_through_datasets(hub: Path) -> None:
    source = hub_source(str(hub), "", ["pqa_labeled", "pqa_unlabeled"], {})
    rows = all_rows(source)
    assert source.official and len(rows) == 107
    assert [(r.question, r.context, r.answer) for r in rows if isinstance(r, Row)] == [
        (r.question, r.context, r.answer) for r in EXPECTED[:100] + EXPECTED[160:]]
    assert rows[0].id == "900" and rows[0].decision == ROWS[0]["final_decision"] and rows[-1].decision == ""


def test_hub_chunks_and_columns(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_ROWS", 9)
    source = hub_source(str(hub), "", ["pqa_labeled"], {})
    assert len(list(source.chunks())) == 12 and len(all_rows(source)) == 100
    with pytest.raises(ConfigError, match=r"run\.data\.columns\.answer: 'reply'"):
        hub_source(str(hub), "", ["pqa_labeled"], {"answer": "reply"})


def test_hub_errors_are_named(hub: Path) -> None:
    for subsets in (["pqa_other"], []):
        with pytest.raises(UserError, match=r"cannot be loaded.*subsets"):
            hub_source(str(hub), "", subsets, {})
    with pytest.raises(UserError, match=r"owner/none.*cannot be loaded.*HF_TOKEN"):
        hub_source("owner/none", "0" * 40, [], {})


def test_a_large_row_group_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_ROWS", 20)
    write("parquet", tmp_path / "r.parquet")
    pq.write_table(pq.read_table(tmp_path / "r.parquet"), tmp_path / "r.parquet", row_group_size=1000)
    source = open_source(DataConfig(path="r.parquet"), tmp_path)
    assert {chunk.kind for chunk in source.chunks()} == {"batch"} and all_rows(source) == EXPECTED


def test_a_json_document_is_not_held_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    row = {"question": "Is it?", "answer": "x" * 500, "context": "y" * 2000}
    with open(tmp_path / "r.json", "w") as file:
        file.write("[" + ",".join([json.dumps(row)] * 20_000) + "]")
    source = open_source(DataConfig(path="r.json"), tmp_path)
    tracemalloc.start()
    count = sum(len(chunk.rows) for chunk in source.chunks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 and (tmp_path / "r.json").stat().st_size > 50e6 and peak < 32e6


def test_sample_is_what_its_readme_says() -> None:
    from collections import Counter

    assert len(ROWS) == 167 and Counter(r["final_decision"] for r in ROWS) == {"yes": 89, "no": 62, "maybe": 16}
    assert len({r["id"] for r in ROWS}) == len({r["question"] for r in ROWS}) == 167
    for r in ROWS:
        assert set(r) == {"id", "question", "contexts", "long_answer", "final_decision"} and r["question"].endswith("?")
        assert 1 <= len(r["contexts"]) <= 4 and 35 <= len(" ".join(r["contexts"]).split()) <= 120, r["id"]


def test_a_header_that_is_no_text_is_named_in_a_message_that_can_be_printed(tmp_path: Path) -> None:
    """Found by tests/fuzz/trainer/test_fuzz_data.py."""
    (tmp_path / "rows.csv").write_bytes(b"\x80question,context,answer\r\na,b,c\r\n")
    with pytest.raises(ConfigError, match="question") as raised:
        all_rows(open_source(DataConfig(path="rows.csv"), tmp_path))
    assert "\\udc80question" in str(raised.value) and str(raised.value).encode()
