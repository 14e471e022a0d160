"""Plots as SVG text that follows the page's colours: lines are CSS variables, so that they are right in light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COLOURS = ("--line-1", "--line-2", "--line-3", "--line-4", "--line-5", "--line-6")
"""CSS variables of the page, in the order in which lines take them."""

_STAND_INS = {f"#0000{i + 1:02x}": name for i, name in enumerate(COLOURS)} | {"#0000f1": "--text", "#0000f2": "--grid"}
_TEXT, _GRID = "#0000f1", "#0000f2"


@dataclass(frozen=True)
class Line:
    """One line of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    """Index into COLOURS."""
    dashed: bool = False
    marked: bool = False
    """Points are marked (few points)."""
    faint: bool = False
    points: int = 600
    """Points that are drawn; more are averaged."""


def thin(x: Sequence[float], y: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """At most `most` points: means of neighbouring ones."""
    size = -(-len(x) // most)
    if size <= 1:
        return list(x), list(y)
    groups = range(0, len(x), size)
    return ([sum(x[i:i + size]) / len(x[i:i + size]) for i in groups], [sum(y[i:i + size]) / len(y[i:i + size]) for i in groups])


def smooth(y: Sequence[float], window: int) -> list[float]:
    """Centred moving average over `window` values (fewer at the ends), which does not lag behind."""
    half = window // 2
    groups = (y[max(0, i - half):i + half + 1] for i in range(len(y)))
    return [sum(g) / len(g) for g in groups]


def plot(title: str, x_label: str, y_label: str, lines: Sequence[Line], zero: bool = False, height: float = 2.4) -> str:
    """An inline SVG element (no script, no reference to anything outside). `zero`: the y axis starts at 0."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(4.6, height), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        x, y = (list(line.x), list(line.y)) if line.marked else thin(line.x, line.y, line.points)
        axes.plot(x, y, label=_escape(line.label), color=f"#0000{line.colour % len(COLOURS) + 1:02x}", lw=0.8 if line.faint else 1.4,
                  alpha=0.35 if line.faint else 1, ls="--" if line.dashed else "-",
                  marker="o" if line.marked or len(x) == 1 else None, ms=3)
    axes.set_xlabel(x_label, color=_TEXT)
    axes.set_ylabel(y_label, color=_TEXT)
    axes.tick_params(colors=_TEXT, length=0)
    axes.grid(color=_GRID, lw=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=x_label == "step"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(v)))
    axes.spines[:].set_visible(False)
    if zero:
        axes.set_ylim(bottom=0)
    if len(lines) > 1:
        axes.legend(frameon=False, labelcolor=_TEXT, fontsize=8, ncols=min(2, len(lines)), loc="lower left",
                    bbox_to_anchor=(0, 1), borderaxespad=0)
    buffer = io.StringIO()
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 9}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue(), title)


def _escape(label: str) -> str:
    """A label as matplotlib draws it: no mathematics, and no leading underscore, which would hide it."""
    return label.replace("$", r"\$").lstrip("_") or " "


def _tick(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:.3g}"


def _inline(svg: str, title: str) -> str:
    """The svg element alone, scalable, with a title, its stand-in colours as CSS variables, its ids its own."""
    from markupsafe import escape

    body = svg[svg.index("<svg"):]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"#0000[0-9a-f]{2}\b", lambda m: f"var({_STAND_INS[m[0]]})" if m[0] in _STAND_INS else m[0], body)
    body = re.sub(r'<g id="patch_1">.*?</g>|<g id="patch_2">.*?</g>', "", body, flags=re.DOTALL)  # the white backgrounds
    body = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", body)
    prefix = re.sub(r"\W+", "-", title.lower())
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", body)
    head = f'<svg role="img" aria-label="{escape(title)}" '
    return re.sub(r'^<svg [^>]*?(viewBox="[^"]+")[^>]*>', lambda m: f'{head}{m.group(1)} xmlns="http://www.w3.org/2000/svg" '
                  'xmlns:xlink="http://www.w3.org/1999/xlink">', body, count=1)


def figures(lines: list[dict[str, Any]], network: dict[str, dict[float, list[float]]], gpu: dict[str, dict[float, list[float]]],
            base_loss: float | None) -> list[tuple[str, str]]:
    """(title, SVG) of every plot for which there are data. `lines`: metrics.jsonl; `network`: rx and tx; `gpu`: utilisation."""
    from trainer.report.metrics import finite

    def series(key: str, colour: int = 0, label: str = "", **style: Any) -> Line:
        points = [(line["step"], v) for line in lines if (v := finite(line.get(key))) is not None]
        return Line(label or key, [p[0] for p in points], [p[1] for p in points], colour, **style)

    found: list[tuple[str, str]] = []

    def add(title: str, x: str, y: str, *drawn: Line, zero: bool = False) -> None:
        if filled := [line for line in drawn if line.x]:
            found.append((title, plot(title, x, y, filled, zero)))

    loss, held_out = series("loss", 0, "training"), series("eval_loss", 1, "held-out", marked=True)
    curves = [loss, held_out]
    if len(loss.x) >= 40:
        smoothed = Line("training, smoothed", loss.x, smooth(loss.y, len(loss.y) // 15), 0)
        curves = [Line("training", loss.x, loss.y, 0, faint=True), smoothed, held_out]
    if base_loss is not None and loss.x:
        curves.append(Line("base, held-out", [0, loss.x[-1]], [base_loss] * 2, 2, dashed=True))
    add("Loss", "step", "loss (nats per token)", *curves)
    add("Throughput", "step", "tokens/s, all workers", series("tokens_per_second"), zero=True)
    add("Learning rate", "step", "learning rate", series("lr"), zero=True)
    add("Gradient norm", "step", "norm before clipping", series("grad_norm"), zero=True)
    def course(nodes: dict[str, dict[float, list[float]]], column: int) -> list[Line]:  # a sample a second is too dense to read
        return [Line(node, [(t - start) / 60 for t in times], [v[column] for v in times.values()], n, points=150)
                for n, (node, times) in enumerate(nodes.items())]

    start = min((t for nodes in (network, gpu) for times in nodes.values() for t in times), default=0.0)
    add("Network received", "minutes", "bytes/s", *course(network, 0), zero=True)
    add("Network sent", "minutes", "bytes/s", *course(network, 1), zero=True)
    add("GPU utilisation", "minutes", "% (mean over the node's GPUs)", *course(gpu, 0), zero=True)
    return found
