"""What the page says about an answer and about the served run, as HTML. Every value is escaped."""

from __future__ import annotations

from html import escape

from chatbot.conversation import Done
from chatbot.serving.facts import METRICS, Facts

LABELS = {"loss": "Loss", "perplexity": "Perplexity", "token_f1": "Token F1", "rouge_l": "ROUGE-L",
          "decision_accuracy": "Decision accuracy", "macro_f1": "Decision macro F1"}


def decision(probabilities: dict[str, float]) -> str:
    """The decision's words, most likely first, each with its probability."""
    if not probabilities:
        return ""
    words = sorted(probabilities.items(), key=lambda item: -item[1])
    spans = "".join(f'<span class="{"first" if i == 0 else ""}"><i style="width:{p * 100:.0f}%"></i>'
                    f'<em>{escape(w)} {p * 100:.0f}%</em></span>'
                    for i, (w, p) in enumerate(words))
    return f'<span class="decision" role="group" aria-label="Decision">{spans}</span>'


def answer_facts(done: Done, model: str, stopped: bool = False) -> str:
    """One line under an answer."""
    parts = [decision(done.decision)]
    if done.end:
        end = done.end
        parts.append(f"<span><b>{end.tokens}</b> tokens</span>")
        if end.tokens_per_second:
            parts.append(f"<span><b>{end.tokens_per_second:.1f}</b> tokens/s</span>")
        parts.append(f"<span>first after <b>{end.first:.2f}</b> s, all after <b>{end.total:.2f}</b> s</span>")
        if done.reason == "length":
            parts.append("<span>cut at the longest length</span>")
    if done.reason == "content_filter":
        parts.append("<span>answered by a guardrail, not by the model</span>")
    redacted = sorted({v.rule for v in done.verdicts if v.check == "personal-data" and v.stage == "input"})
    if redacted:
        parts.append(f"<span>removed from your text: {escape(', '.join(redacted))}</span>")
    who = f"{'base model' if model == 'base' else 'tuned model'} of {done.facts.run}"
    parts.append(f"<span>{escape(who)}</span>")
    return f'<div class="facts">{"".join(parts)}</div>'


def line(text: str) -> str:
    """A plain line under an answer."""
    return f'<div class="facts"><span>{escape(text)}</span></div>' if text else '<div class="facts"></div>'


def head(title: str, ready: bool, state: str, facts: Facts | None, user: str, logout: str) -> str:
    """Title, what is served, links."""
    links = []
    if user:
        links.append(f"<span>{escape(user)}</span>")
    if logout:
        links.append(f'<a href="{escape(logout)}">Log out</a>')
    chip = escape(facts.run if ready and facts else state)
    return (f'<div id="head"><h1>{escape(title)}</h1>'
            f'<span class="chip {"ready" if ready else "away"}" title="{escape(state)}">{chip}</span>'
            f'<span class="links">{"".join(links)}</span></div>')


def about(facts: Facts | None, report: str) -> str:
    """Where the answers come from and how good the model is."""
    if facts is None:
        return '<div class="about">No model is loaded.</div>'
    rows = [("Run", facts.run), ("Hash", facts.hash), ("Checkpoint", f"sha256 {facts.checkpoint_sha256}"),
            ("Base model", facts.base_model),
            ("Dataset", facts.dataset)]
    table = "".join(f"<tr><th scope=row>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows if v)
    if report and facts.report:
        table += (f'<tr><th scope=row>Report</th><td><a href="{escape(report)}" target="_blank" rel="noopener">'
                  'How it was trained and evaluated</a></td></tr>')
    figures = ""
    if facts.evaluation:
        names = [m for m in METRICS if any(m in side for side in facts.evaluation.values())]
        sides = [s for s in ("base", "tuned") if s in facts.evaluation]
        header = "".join(f"<th scope=col>{s.capitalize()}</th>" for s in sides)
        body = "".join(f"<tr><td>{LABELS[m]}</td>" + "".join(
            f"<td>{facts.evaluation[s][m]:.3f}</td>" if m in facts.evaluation[s] else "<td>–</td>" for s in sides) + "</tr>" for m in names)
        figures = f'<table class="figures"><tr><th scope=col>On held-out rows</th>{header}</tr>{body}</table>'
    return f'<div class="about"><table>{table}</table>{figures}</div>'
