"""Report, plots and `make results`. Run: python -m pytest tests/trainer/test_report.py"""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.made_run import DEVICE, configuration, make_dataset, make_records, rows
from tools.errors import OperatorError
from tools.results import newest, results
from trainer.evaluate import run as stage
from trainer.export import TensorReader, export
from trainer.files import directory_digest, read_manifest
from trainer.model.load import load_model
from trainer.paths import RunPaths
from trainer.plan import plan
from trainer.report.document import network_table, verdict
from trainer.report.metrics import duration, number, rate, records, samples, training_summary
from trainer.report.plots import Line, plot, smooth, thin
from trainer.report.prediction import comparison, on_workers
from trainer.report.write import write_report

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}{% raw %}|`**\n# head $x$ \u202e"


def evaluation(examples: list[Any], gain: float) -> dict[str, Any]:
    """evaluation.json for made-up results: the tuned model's loss is lower by `gain`."""
    rng = np.random.default_rng(1)

    def model(shift: float) -> dict[int, dict[str, Any]]:
        return {r.index: {"loss": (2.6 - shift + rng.normal(0, 0.1)) * len(r.target), "tokens": len(r.target), "own": [-1.0, -2.0, -3.0],
                          "harness": [-1.0, -2.0, -3.0], "answer": HOSTILE, "answer_tokens": 9, "cut": False} for r in examples}

    base, tuned = model(0), model(gain)
    return {**stage.summarise(examples, base, tuned, len(examples), 200, 1), "of": {"format": 1}, "rows_sha256": "ab",
            "contamination": {"rows": len(examples), "flagged": 0, "share": 0.0, "ids": []},
            "samples": [{**s, "question": HOSTILE} for s in stage.samples(examples[:2], base, tuned)],
            "seconds": 5.0, "world": 2, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, RunPaths, dict[str, Any]]:
    config = configuration(tmp_path_factory.mktemp("storage"))
    paths = RunPaths.of(config)
    tokenizer = make_dataset(config, paths, rows(20), rows(12, 2))
    make_records(paths, config, gpus=True)
    export(config, paths, TensorReader(dict(load_model(config).named_parameters())), tokenizer)
    paths.evaluation.write_text(json.dumps(evaluation(stage.held_out(paths.dataset, 0, 17, True), 0.5)))
    return config, paths, write_report(config, paths)


class Page(HTMLParser):
    """Elements and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_json_has_what_others_read(made: tuple[Any, RunPaths, dict[str, Any]]) -> None:
    config, paths, report = made
    assert report == json.loads(paths.report("json").read_text())
    assert report["run"] == config.run_id and report["state"] == "finished" and report["gate"]["passed"]
    assert {"loss", "perplexity", "token_f1", "rouge_l", "decision_accuracy", "macro_f1"} <= report["base"].keys() & report["tuned"].keys()
    assert {"mean", "low", "high"} <= report["difference"]["loss"].keys()
    assert {"steps", "tokens", "tokens_per_second", "seconds", "final_loss"} <= report["train"].keys()
    assert {"id", "question", "reference", "base", "tuned"} <= report["samples"][0].keys()
    assert report["checkpoint_sha256"] == directory_digest(read_manifest(paths.model, hashes=True))
    assert report["verdict"]["state"] == "better" and "held-out loss" in report["verdict"]["text"]
    assert report["data"]["splits"]["test"]["rows"] == 12 and len(report["gpu"]) == 2


def test_workers_say_what_they_did_and_waited(made: tuple[Any, RunPaths, dict[str, Any]]) -> None:
    _, paths, report = made
    workers = report["workers"]
    assert [w["tokens"] for w in workers["ranks"]] == [5 * (2 * 2048 + 22 * 2752), 5 * (2 * 2048 + 22 * 1344)]
    assert [w["wait"] for w in workers["ranks"]] == [2 * 9.0 + 22.0, 0.0] and workers["ranks"][1]["share"] == pytest.approx(23 / 25)
    assert workers["seconds"] == 600.0 and workers["rest"] == pytest.approx(48.0)
    assert workers["budgets"] == [{"step": 1, "ranks": [[1, 2048]] * 2}, {"step": 11, "ranks": [[1, 2752], [1, 1344]]}]
    markdown, page = paths.report("md").read_text(), paths.report("html").read_text()
    assert "| 0 | 323,200 | 8 min 32 s | 40 s | 85 % |" in markdown
    assert "\n- from step 1: 1 x 2,048 (2 workers)\n" in markdown and "\n- from step 11: 1 x 2,752, 1 x 1,344\n" in markdown
    assert "<h2>Workers</h2>" in page and "from step 11: 1 x 2,752, 1 x 1,344." in page


def test_prediction_stands_beside_the_measurement(made: tuple[Any, RunPaths, dict[str, Any]]) -> None:
    """Two H100 on a node each: plan for these, medians of the steps, and what a node's physical card sent in them."""
    config, paths, report = made
    rows = {row["quantity"]: row for row in report["prediction"]}
    assert list(rows) == ["Seconds a step", "Tokens/s", "Sent by a node in a step, bytes"]
    said = plan(on_workers(config, [{"device": DEVICE, "workers": 2, "node_workers": 1}]))
    assert said.nodes == 2 and said.groups[0].group.gpu is not None and said.groups[0].group.gpu.name == "H100-80GB"
    assert [row["predicted"] for row in rows.values()] == [said.step_seconds, said.tokens_per_second, said.wire_bytes]
    assert rows["Seconds a step"]["measured"] == pytest.approx(5, rel=0.05) and rows["Tokens/s"]["measured"] == pytest.approx(820, rel=0.05)
    mean = sum(row["tx_mean"] for row in report["network"]) / 2
    assert rows["Sent by a node in a step, bytes"]["measured"] == pytest.approx(5 * mean, rel=0.05)
    assert "| Seconds a step |" in paths.report("md").read_text()
    assert "<h2>Prediction and measurement</h2>" in paths.report("html").read_text()


def test_prediction_needs_known_gpus_and_is_of_the_newest_workers(made: tuple[Any, RunPaths, dict[str, Any]]) -> None:
    config, paths, _ = made
    lines = records(paths)
    for line in lines:
        if "workers" in line:
            device = "cpu" if line["step"] <= 60 else DEVICE
            line["workers"] = {**line["workers"], "layout": [{"device": device, "workers": 1, "node_workers": 1}]}
        line["tokens_per_second"] = 10.0 if line["step"] <= 60 else 20.0
    found = comparison(config, paths, lines)
    assert [row["quantity"] for row in found] == ["Seconds a step", "Tokens/s"] and found[1]["measured"] == 20.0
    assert comparison(config, paths, lines[:60]) == [], "plan has no speed of a CPU, and one node sends nothing"
    assert comparison(config, paths, [{k: v for k, v in line.items() if k != "workers"} for line in lines]) == []


def test_page_is_self_contained_and_escaped(made: tuple[Any, RunPaths, dict[str, Any]]) -> None:
    text = made[1].report("html").read_text()
    page = Page(text)
    assert not {"script", "img", "iframe", "link", "object", "base", "form"} & set(page.tags)
    assert page.tags.count("svg") == 7 and page.tags.count("article") == 2
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert value is not None and value.startswith("#"), (name, value)
    assert "&lt;script&gt;alert(1)" in text and "{{ 7*7 }}" in text
    assert not re.search(r"url\((?!#)|@import", text)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_markdown_does_not_run_hostile_text(made: tuple[Any, RunPaths, dict[str, Any]]) -> None:
    text = made[1].report("md").read_text()
    outside = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert "<script>" not in outside.replace("\\<", "") and "\n# head" not in text
    assert "| Held-out loss (lower is better) |" in text and "## Network" in text and "llm-finetune-worker-1" in text


def test_card_gains_the_figures(made: tuple[Any, RunPaths, dict[str, Any]]) -> None:
    config, paths, report = made
    card = (paths.model / "README.md").read_text()
    assert "| Held-out loss |" in card and "<script" not in card
    before = (paths.model / "README.md").stat().st_mtime_ns
    again = write_report(config, paths)
    assert again["checkpoint_sha256"] == report["checkpoint_sha256"] and (paths.model / "README.md").stat().st_mtime_ns == before


def test_unfinished_runs_have_a_report(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    paths = RunPaths.of(config)
    paths.root.mkdir(parents=True)
    report = write_report(config, paths)
    assert report["state"] == "incomplete" and not report["gate"]["passed"] and report["verdict"]["state"] == "none"
    assert "Not evaluated" in paths.report("html").read_text() and "Not evaluated" in paths.report("md").read_text()


def test_worse_models_are_said_to_be_worse(made: tuple[Any, RunPaths, dict[str, Any]], tmp_path: Path) -> None:
    _, paths, _ = made
    result = evaluation(stage.held_out(paths.dataset, 0, 17, True), -0.5)
    said = verdict(result)
    assert said["state"] == "worse" and said["text"].startswith("Tuned is worse than base on held-out loss;")
    undefined = copy.deepcopy(result)
    for figure in undefined["difference"].values():
        figure.update(mean=None, low=None, high=None)
    assert verdict(undefined)["state"] == "same"


def test_network_counts_the_physical_way_once(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    paths = RunPaths.of(config)
    paths.root.mkdir(parents=True)
    paths.network.write_text("time,node,interface,rx_bytes_per_s,tx_bytes_per_s\n" + "\n".join([
        "1,b,eth0,100,10", "1,b,eth1,100,0", "1,b,lo,9999,9999", "1,b,veth7,5000,5000", "2,b,eth0,400,30", "2,b,eth1,0,0",
        "1,a,cni0,7,8", "broken", "3,b,eth0,nan,1", "4,b,eth0,1"]))
    assert network_table(paths) == [
        {"node": "a", "samples": 1, "rx_mean": 7, "rx_max": 7, "tx_mean": 8, "tx_max": 8},
        {"node": "b", "samples": 2, "rx_mean": 300, "rx_max": 400, "tx_mean": 20, "tx_max": 30}]
    assert samples(paths.gpu, ("utilisation",)) == {}


def test_training_summary_of_a_resumed_run(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    paths = RunPaths.of(config)
    paths.root.mkdir(parents=True)
    lines = [{"step": s, "loss": 3.0 - s, "tokens": 100, "tokens_per_second": 50.0, "rows": 2, "epoch": s / 3} for s in (1, 2, 2, 3)]
    lines[2]["loss"], lines[3]["eval_loss"] = 0.5, 0.25
    paths.metrics.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "lo')
    got = training_summary(paths)
    assert (got["steps"], got["tokens"], got["seconds"], got["tokens_per_second"]) == (3, 300, 6.0, 50.0)
    assert (got["final_loss"], got["eval_loss"], got["epoch"]) == (0.0, 0.25, 1.0)


@pytest.mark.parametrize(("value", "signed", "text"), [
    (2.0736, False, "2.074"), (0.00012, False, "0.0001"), (-0.52, True, "−0.5200"), (0.5, True, "+0.5000"), (123456.7, False, "123,457"),
    (0, True, "0"), (1e-9, True, "0"), (None, False, "–"), (float("nan"), False, "–"), (True, False, "–"), (99.996, False, "100.00")])
def test_numbers(value: Any, signed: bool, text: str) -> None:
    assert number(value, signed) == text


def test_rates_and_durations() -> None:
    assert [rate(v) for v in (0, 999, 1500, 2.5e7, 3e9, 5e12, None)] == [
        "0 B/s", "999 B/s", "1.50 kB/s", "25.0 MB/s", "3.00 GB/s", "5000 GB/s", "–"]
    assert [duration(v) for v in (1.24, 59.6, 61, 7325, None)] == ["1.2 s", "1 min 00 s", "1 min 01 s", "2 h 02 min", "–"]


def test_plots() -> None:
    svg = plot("A <b> & plot", "step", "y", [Line("_hidden $x$ <i>", [1, 2], [1, 2]), Line("b", [1], [2], 1)])
    assert svg.startswith('<svg role="img" aria-label="A &lt;b&gt; &amp; plot" viewBox=') and svg.rstrip().endswith("</svg>")
    assert "var(--line-1)" in svg and "var(--line-2)" in svg and "var(--text)" in svg and "#0000" not in svg
    assert "hidden $x$ &lt;i&gt;" in svg and "<i>" not in svg
    assert plot("t", "x", "y", [Line("a", [1, 2], [1, 2])]) == plot("t", "x", "y", [Line("a", [1, 2], [1, 2])])
    x, y = thin(list(range(1000)), [2.0] * 1000, 100)
    assert len(x) == 100 and set(y) == {2.0} and x[0] == 4.5
    assert smooth([0.0, 3.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 4.0, 4.5]) and smooth([1.0, 2.0], 1) == [1.0, 2.0]


def test_results(made: tuple[Any, RunPaths, dict[str, Any]], tmp_path: Path) -> None:
    _, paths, report = made
    found = results(newest(paths.root.parent))
    assert found["run"] == report["run"] and found["base"] == report["base"] and found["train"] == report["train"]
    assert "bounds" not in found["difference"]["loss"] and json.dumps(found, allow_nan=False)
    with pytest.raises(OperatorError, match="There is no run"):
        newest(tmp_path)
    run = tmp_path / "run-0123456789"
    run.mkdir()
    (run / "run.yaml").write_text("")
    (run / "progress.json").write_text(json.dumps({"stage": "train", "percent": 41.7, "message": "step 5 of 12"}))
    with pytest.raises(OperatorError, match=r"no report yet: train, 42 % \(step 5 of 12\)"):
        results(newest(tmp_path))
    (run / "report.json").write_text("[]")
    with pytest.raises(OperatorError, match="not a run's report"):
        results(run)
