"""The check's result as text and as a self-contained page, with the bandwidth between nodes as a picture."""

from __future__ import annotations

from html import escape
from typing import Any

from tools.site.judge import Finding, size

LEVELS = {"stop": "STOP", "warn": "warn", "ok": "ok"}


def verdict(result: dict[str, Any], findings: list[Finding]) -> str:
    """One sentence."""
    stops = sum(f.level == "stop" for f in findings)
    warns = sum(f.level == "warn" for f in findings)
    run = result["plan"].get("run") or "a run"
    if stops:
        return f"{run} cannot run in {result['environment']}: {_count(stops, 'thing')} to mend" + (
            f", {_count(warns, 'warning')}." if warns else ".")
    return f"{run} can run in {result['environment']}" + (f"; {_count(warns, 'warning')}." if warns else ".")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def node_rows(result: dict[str, Any]) -> list[list[str]]:
    """Header and one row a pod: what was measured there."""
    rows = [["pod on", "group", "GPUs", "driver", "write MB/s", "read MB/s", "fsync ms", "p99 ms", "free", "start s"]]
    for pod in result["pods"]:
        found, facts = pod.get("storage", {}), pod.get("facts", {})

        def figure(key: str, digits: int = 0, of: dict[str, Any] = found) -> str:
            return f"{of[key]:,.{digits}f}" if key in of else "-"

        rows.append([pod["label"], pod["group"], str(len(facts.get("gpus", []))) if pod["gpus"] else "-", facts.get("driver", "-"),
                     figure("write_mb_s"), figure("read_mb_s"), figure("fsync_ms", 1), figure("fsync_p99_ms", 1),
                     size(found["free_bytes"]) if "free_bytes" in found else "-",
                     f"{pod['start_seconds']:.1f}" if pod["running"] else "NOT RUNNING"])
    return rows


def matrix(result: dict[str, Any], key: str) -> tuple[list[str], list[list[float | None]]]:
    """Names and values by sender (rows) and receiver (columns)."""
    names = [p["label"] for p in result["pods"] if p["running"]]
    values = {(p["from"], p["to"]): p.get(key) for p in result["network"]}
    return names, [[values.get((a, b)) for b in names] for a in names]


def text(result: dict[str, Any], findings: list[Finding]) -> str:
    """What the command prints."""
    lines = [f"Site check of {result['environment']} ({result['namespace']}), {result['time']}", ""]
    rows = node_rows(result)
    names, gbps = matrix(result, "gbps")
    tables = [rows]
    if 1 < len(names) <= 12:
        tables.append([["Gbit/s, from (row) to", *names], *([name, *("-" if v is None else f"{v:.1f}" for v in row)]
                                                           for name, row in zip(names, gbps, strict=True))])
    for table in tables:
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines += ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
                  for row in table]
        lines.append("")
    for finding in findings:
        lines.append(f"{LEVELS[finding.level]:5} {finding.area:8} {finding.what}")
        if finding.mend:
            lines.append(f"{'':14} -> {finding.mend}")
    return "\n".join([*lines, "", verdict(result, findings)])


def picture(names: list[str], values: list[list[float | None]], unit: str, title: str) -> str:
    """A matrix of squares as inline SVG: the fuller the colour, the larger the value; senders are rows, receivers columns."""
    cell, left, top = 66, 215, 40
    most = max((v for row in values for v in row if v is not None), default=1.0) or 1.0
    width, height = left + max(cell * len(names), 180) + 10, top + cell * len(names) + 26
    short = [n if len(n) <= 22 else f"{n[:10]}…{n[-11:]}" for n in names]
    parts = [f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {width} {height}" style="max-width:{width}px" '
             'xmlns="http://www.w3.org/2000/svg">']
    for column, _ in enumerate(names):
        parts.append(f'<text x="{left + cell * column + cell / 2}" y="{top - 10}" text-anchor="middle" class="name">{column + 1}</text>')
    for row, name in enumerate(short):
        y = top + cell * row
        parts.append(f'<text x="{left - 10}" y="{y + cell / 2 + 4}" text-anchor="end" class="name">{row + 1} {escape(name)}</text>')
        for column, value in enumerate(values[row]):
            x = left + cell * column
            if value is None:
                parts.append(f'<rect x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{cell - 2}" rx="4" class="none"/>')
                continue
            share = value / most
            parts.append(f'<rect x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{cell - 2}" rx="4" fill="var(--line-1)" '
                         f'fill-opacity="{0.12 + 0.78 * share:.2f}"><title>{escape(names[row])} to {escape(names[column])}: '
                         f'{value:.2f} {unit}</title></rect><text x="{x + cell / 2}" y="{y + cell / 2 + 5}" text-anchor="middle" '
                         f'class="{"on" if share > 0.55 else "off"}">{value:.{1 if value < 100 else 0}f}</text>')
    parts.append(f'<text x="{left}" y="{height - 6}" class="name">{escape(unit)}, from row to column</text></svg>')
    return "".join(parts)


STYLE = """
:root { --page: #f6f7f9; --card: #fff; --text: #1b2430; --soft: #5a6675; --grid: #e3e7ec; --good: #14713d; --bad: #b3261e; --warn: #8a5a00;
  --line-1: #2563c9; --on: #fff; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1a2029; --text: #e4e9f0; --soft: #9ba7b6; --grid: #2c3541;
  --good: #63d296; --bad: #ff8a80; --warn: #ffc24d; --line-1: #6aa5ff; --on: #0b1220; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 17px; margin: 32px 0 10px; } p { margin: 0 0 8px; } .soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 16px; margin: 16px 0; overflow-x: auto; }
.verdict { border-left: 5px solid var(--good); font-size: 18px; font-weight: 600; } .verdict.stop { border-left-color: var(--bad); }
.verdict.warn { border-left-color: var(--warn); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; border-top: 1px solid var(--grid); white-space: nowrap; }
th { border-top: 0; color: var(--soft); font-weight: 500; font-size: 13px; } th:first-child, td:first-child { text-align: left; }
table.findings td { text-align: left; white-space: normal; vertical-align: top; overflow-wrap: anywhere; }
table.findings td:first-child { white-space: nowrap; overflow-wrap: normal; } table.findings tr:first-child td { border-top: 0; }
.stop b { color: var(--bad); } .warn b { color: var(--warn); } .ok b { color: var(--good); }
td small { display: block; color: var(--soft); }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 13px; fill: var(--text); } svg .name { fill: var(--soft); }
svg .on { fill: var(--on); } svg .none { fill: none; stroke: var(--grid); }
@media (max-width: 600px) { table.findings td:nth-child(2), table.findings th:nth-child(2) { display: none; } main { padding-top: 14px; } }
"""


def html(result: dict[str, Any], findings: list[Finding]) -> str:
    """The page: no script, nothing from elsewhere."""
    worst = findings[0].level if findings else "ok"
    head, *rows = node_rows(result)
    pictures = []
    for key, unit, title in (("gbps", "Gbit/s", "TCP bandwidth"), ("latency_us", "µs", "Round trip, median")):
        names, values = matrix(result, key)
        if len(names) > 1:
            pictures.append(f"<h2>{title}</h2><div class='card'>{picture(names, values, unit, title)}</div>")
    listed = "".join(f"<tr class='{f.level}'><td><b>{LEVELS[f.level]}</b></td><td>{escape(f.area)}</td><td>{escape(f.what)}"
                     + (f"<small>{escape(f.mend)}</small>" if f.mend else "") + "</td></tr>" for f in findings)
    table = ("".join(f"<th>{escape(c)}</th>" for c in head),
             "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Site check of {escape(result['environment'])}</title><style>{STYLE}</style></head><body><main>
<h1>Site check of {escape(result['environment'])}</h1>
<p class="soft">{escape(result['namespace'])}, {escape(result['time'])}, {result['seconds']:.0f} s</p>
<div class="card verdict {worst}">{escape(verdict(result, findings))}</div>
<h2>Findings</h2><div class="card"><table class="findings"><tbody>{listed}</tbody></table></div>
<h2>Nodes and storage</h2><div class="card"><table><thead><tr>{table[0]}</tr></thead><tbody>{table[1]}</tbody></table></div>
{''.join(pictures)}
</main></body></html>
"""
