"""HTML and Markdown in questions, answers and the run's own files are shown by the page, never executed (in a real browser)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from conftest import Storage
from test_page import CHROMIUM, TOOLS, free_port

RUN = "document.documentElement.setAttribute('data-executed','1')"
ATTACKS = [f"<script>{RUN}</script>", f"<img src=x onerror=\"{RUN}\">", f"<svg/onload={RUN}>", f"[a](javascript:{RUN})",
           f"<a href='javascript:{RUN}' autofocus onfocus={RUN}>x</a>", f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
           f"<details open ontoggle={RUN}>", "![x](http://attacker.example/pixel.png)",
           f"<form action=javascript:{RUN}><input autofocus onfocus={RUN}>",
           "<base href='http://attacker.example/'>", f"$\\href{{javascript:{RUN}}}{{x}}$", "<style>@import 'http://attacker.example/a.css'</style>"]
HOSTILE = " ".join(ATTACKS)


@pytest.mark.skipif(not (TOOLS.exists() and CHROMIUM.exists()), reason=f"needs {TOOLS} with playwright, and {CHROMIUM}")
@pytest.mark.timeout(600)
def test_nothing_hostile_is_executed(storage: Storage, tmp_path: Path) -> None:
    storage.add("demo-0123456789")
    names = {"run": {"model": {"path": HOSTILE}, "data": {"name": HOSTILE}}}
    (storage.root / "runs/demo-0123456789/run.yaml").write_text(yaml.safe_dump(names))
    port = free_port()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({
        "storage": str(storage.root), "serve": {"follow": "latest"}, "engine": {"threads": 1, "context": 2048, "device": "cpu"},
        "server": {"port": port, "temporary": str(tmp_path / "tmp")}, "page": {"max_tokens": 8},
        # A fixed text stands where the model's answer stands, and is shown as that is: this one is what a hostile model would write.
        "guardrails": {"texts": {"crisis": f"The model says: {HOSTILE}"}, "checks": {"rate": {"enabled": False}}}}))
    root = Path(__file__).parents[2]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "chatbot", "serve", "--config", str(tmp_path / "config.yaml")], cwd=root,
                                  env={**os.environ, "PYTHONPATH": str(root)}, stdout=log, stderr=log)
        try:
            url, until = f"http://127.0.0.1:{port}/", time.monotonic() + 300
            while True:
                assert server.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
                try:
                    if httpx.get(f"{url}readyz").status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(0.3)
            driver = subprocess.run([TOOLS, Path(__file__).with_name("browser_hostile.py"), url, HOSTILE], capture_output=True, text=True,
                                    timeout=300)
            assert driver.returncode == 0, driver.stderr + (tmp_path / "log").read_text()
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    seen = json.loads(driver.stdout)
    assert not seen["executed"] and seen["dialogs"] == [] and seen["handlers"] == [] and seen["links"] == []
    assert seen["outside"] == [], "a picture or style sheet of somebody else was asked for"
    assert "Does vitamin D help?" in seen["question"] and "The model says:" in seen["answer"]
    assert "<script>" in seen["about"], "names are shown as text"
