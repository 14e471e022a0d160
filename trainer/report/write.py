"""report.json, report.md and report.html of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.export import update_card
from trainer.files import read_manifest, write_atomic, write_json
from trainer.paths import RunPaths
from trainer.report.document import build, cells, run_yaml
from trainer.report.metrics import duration, finite, number, rate, records, samples
from trainer.report.plots import figures
from trainer.report.workers import describe_budgets

_TEMPLATES = Path(__file__).parent


def write_report(config: Config, paths: RunPaths, gate: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write report.html, report.md and, last, report.json (whoever follows runs waits for that). Returns its document.

    `gate`: thresholds by which the verdict is made (default: trainer/evaluate/gate.yaml). The model card gains the figures.
    """
    report = build(config, paths, gate)
    if read_manifest(paths.model) is not None:
        update_card(config, paths, report)
    plots = figures(records(paths), samples(paths.network, ("rx_bytes_per_s", "tx_bytes_per_s")),
                    samples(paths.gpu, ("utilisation",), average=True), finite(report["base"].get("loss")))
    write_atomic(paths.report("html"), render("report.html.j2", report, plots))
    write_atomic(paths.report("md"), render("report.md.j2", report, plots))
    write_json(paths.report("json"), report)
    return report


def render(template: str, report: dict[str, Any], plots: list[tuple[str, str]]) -> str:
    """The report as a page. Everything that comes from rows, models and configuration is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    html = template.endswith(".html.j2")
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=html, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True, keep_trailing_newline=True)
    filters: dict[str, Any] = {"number": number, "rate": rate, "duration": duration, "bytes": lambda v: rate(v).removesuffix("/s"),
                            "cell": markdown_cell, "quote": markdown_quote, "budgets": describe_budgets}
    environment.filters |= filters
    return environment.get_template(template).render(
        report=report, main=cells(report, True), details=cells(report, False), config=run_yaml(report),
        plots=[(title, Markup(svg)) for title, svg in plots])  # plots.py escapes labels


def markdown_cell(value: Any) -> str:
    """A value in a Markdown table: one line, without characters that Markdown or HTML read."""
    text = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|&~" else c for c in text)


def markdown_quote(value: Any) -> str:
    """Text of any lines as an indented block, which Markdown does not interpret."""
    return "\n".join(f"    {line}" for line in str(value).splitlines()) or "    (empty)"
