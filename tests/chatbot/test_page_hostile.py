"""HTML and Markdown in questions, answers and the run's own files are shown by the page, never executed (in a real browser)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import Storage, browse, in_a_browser

RUN = "document.documentElement.setAttribute('data-executed','1')"
ATTACKS = [f"<script>{RUN}</script>", f"<img src=x onerror=\"{RUN}\">", f"<svg/onload={RUN}>", f"[a](javascript:{RUN})",
           f"<a href='javascript:{RUN}' autofocus onfocus={RUN}>x</a>", f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
           f"<details open ontoggle={RUN}>", "![x](http://attacker.example/pixel.png)",
           f"<form action=javascript:{RUN}><input autofocus onfocus={RUN}>",
           "<base href='http://attacker.example/'>", f"$\\href{{javascript:{RUN}}}{{x}}$", "<style>@import 'http://attacker.example/a.css'</style>"]
HOSTILE = " ".join(ATTACKS)


@in_a_browser
@pytest.mark.timeout(600)
def test_nothing_hostile_is_executed(storage: Storage, tmp_path: Path) -> None:
    storage.add("demo-0123456789")
    names = {"run": {"model": {"path": HOSTILE}, "data": {"name": HOSTILE}}}
    (storage.root / "runs/demo-0123456789/run.yaml").write_text(yaml.safe_dump(names))
    config = {
        "storage": str(storage.root), "serve": {"follow": "latest"}, "engine": {"threads": 1, "context": 2048, "device": "cpu"},
        "page": {"max_tokens": 8},
        # A fixed text stands where the model's answer stands, and is shown as that is: this one is what a hostile model would write.
        "guardrails": {"texts": {"crisis": f"The model says: {HOSTILE}"}, "checks": {"rate": {"enabled": False}}}}
    seen = browse(tmp_path, config, "browser_hostile.py", HOSTILE, timeout_s=300)
    assert not seen["executed"] and seen["dialogs"] == [] and seen["handlers"] == [] and seen["links"] == []
    assert seen["outside"] == [], "a picture or style sheet of somebody else was asked for"
    assert "Does vitamin D help?" in seen["question"] and "The model says:" in seen["answer"]
    assert "<script>" in seen["about"], "names are shown as text"
