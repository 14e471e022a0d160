"""Rows and answers as attackers of the report: nothing of them is executed, and no figure changes with them.

The page is opened by a real browser where there is one (Chromium).
"""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.made_run import configuration, make_dataset, make_records, rows
from tests.trainer.test_report import evaluation
from trainer.evaluate import run as stage
from trainer.paths import RunPaths
from trainer.report.write import write_report
from trainer.train.samplers import Sampler

CHROMIUM = Path("/usr/bin/chromium")
MARK = "was-executed"
RUN = f"document.documentElement.setAttribute('data-{MARK}','1')"
ATTACKS = [
    f"<script>{RUN}</script>", f'<img src=x onerror="{RUN}">', f"<svg/onload={RUN}>", f"</style><script>{RUN}</script>",
    f"</pre></code></details><script>{RUN}</script>", f'"><body onload={RUN}>', f"<iframe srcdoc='<script>parent.{RUN}</script>'>",
    f"[a](javascript:{RUN})", f"<a href=\"javascript:{RUN}\" autofocus onfocus={RUN}>x</a>", f"{{{{ {RUN} }}}}", "{% for x in y %}",
    f"<math><mtext></form><form><mglyph><style></math><img src onerror={RUN}>", f"<base href=javascript:{RUN}//>",
    f"<meta http-equiv=refresh content='0;url=javascript:{RUN}'>", f"<!--<script>--><script>{RUN}</script>",
    "| Held-out loss (lower is better) | 0.001 | 0.001 |", "\n\n## Verdict\n\nTuned is better than base on everything.\n",
    '", "gate": {"passed": true, "reasons": []}, "x": "', "</article></main><h2>Verdict</h2><p>passed</p>", "=HYPERLINK(\"http://x\")",
    "\u202egnitartsnomed", "\x1b[2J", "```\n# broken out\n", "$\\href{javascript:x}{y}$"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, RunPaths, dict[str, Any]]:
    """A run with figures, and its evaluation; no report yet."""
    config = configuration(tmp_path_factory.mktemp("storage"))
    paths = RunPaths.of(config)
    make_dataset(config, paths, rows(20), rows(12, 2))
    make_records(paths, config)
    return config, paths, evaluation(stage.held_out(paths.dataset, 0, 17, True), -0.5)


def report(made: tuple[Any, RunPaths, dict[str, Any]], text: str) -> tuple[dict[str, Any], str, str]:
    """report.json, report.html, report.md where every text of the samples is `text`."""
    config, paths, result = made
    result = copy.deepcopy(result)
    for sample in result["samples"]:
        sample |= dict.fromkeys(("id", "question", "context", "reference", "base", "tuned", "decision"), text)
    paths.evaluation.write_text(json.dumps(result))
    return write_report(config, paths), paths.report("html").read_text(), paths.report("md").read_text()


@pytest.fixture(scope="module")
def harmless(made: tuple[Any, RunPaths, dict[str, Any]]) -> tuple[dict[str, Any], str, str]:
    return report(made, "plain")


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_figure_changes_with_the_text(made: tuple[Any, RunPaths, dict[str, Any]], harmless: tuple[dict[str, Any], str, str],
                                         attack: str) -> None:
    plain, page, markdown = harmless
    hostile, hostile_page, hostile_markdown = report(made, attack)
    assert not plain["gate"]["passed"] and plain["verdict"]["state"] == "worse"
    assert {k: v for k, v in hostile.items() if k != "samples"} == {k: v for k, v in plain.items() if k != "samples"}
    assert all(sample["question"] == attack for sample in hostile["samples"])
    outside = [re.sub(r'<article class="card sample">.*?</article>', "", text, flags=re.S) for text in (page, hostile_page)]
    assert outside[0] == outside[1]

    def figures(text: str) -> list[str]:
        """Headings and rows of tables: what stands at the beginning of a line, as Markdown reads them."""
        return [line for line in text.splitlines() if line.startswith(("|", "# ", "## ", "```"))]

    assert figures(markdown) == figures(hostile_markdown)


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}")
def test_a_browser_executes_nothing(made: tuple[Any, RunPaths, dict[str, Any]], tmp_path: Path) -> None:
    _, page, _ = report(made, "\n".join(ATTACKS))

    def opened(text: str) -> str:
        path = tmp_path / "page.html"
        path.write_text(text)
        return subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom", path.as_uri()],
                              capture_output=True, text=True, timeout=120, check=True).stdout

    assert f"data-{MARK}" in opened(f"<html><body>{ATTACKS[0]}</body></html>"), "the browser runs scripts where it is let"
    dom = opened(page)
    assert "Samples" in dom and not re.search(rf"<html[^>]*data-{MARK}", dom)


class Hostile:
    """A source of samples whose names are formulas."""

    columns = ("time", "node", "interface")

    def rows(self, now: float, node: str) -> list[tuple[Any, ...]]:
        return [(now, node, name) for name in ("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "eth0", -1.5)]


def test_no_cell_of_the_samples_is_a_formula(tmp_path: Path) -> None:
    """Spreadsheets compute what begins with = + - @: interfaces and nodes are named by others."""
    sampler = Sampler(tmp_path, {"network": Hostile()}, node="=node", every_s=0.05)
    sampler.close()
    text = "".join(path.read_text() for path in tmp_path.rglob("*.csv"))
    cells = [cell for line in csv.reader(io.StringIO(text)) for cell in line]
    assert "'=1+1" in cells and "'=node" in cells and "eth0" in cells and "-1.5" in cells
    assert not [cell for cell in cells if cell[:1] in "=+-@\t" and cell and not re.fullmatch(r"-?\d+(\.\d+)?", cell)]
