"""The page in a real browser: login, streaming, stop, retry, edit, guardrail, feedback, side by side, export, phone.

Nothing is loaded from elsewhere.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from conftest import Storage

from chatbot.access.users import hash_password
from chatbot.records.jsonl import read_lines

TOOLS = Path(os.environ.get("LLM_FINETUNE_TOOLS_PYTHON") or Path.home() / ".cache/llm-finetune/venv/tools/bin/python")
CHROMIUM = Path("/usr/bin/chromium")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.skipif(not (TOOLS.exists() and CHROMIUM.exists()), reason=f"needs {TOOLS} with playwright, and {CHROMIUM}")
@pytest.mark.timeout(900)
def test_page(storage: Storage, tmp_path: Path) -> None:
    storage.add("demo-0123456789")
    shots = Path(os.environ.get("CHATBOT_SCREENSHOTS") or tmp_path)
    port = free_port()
    (tmp_path / "users").write_text(f"ann:{hash_password('correct horse')}\n")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({
        "storage": str(storage.root), "serve": {"follow": "latest", "base": True},
        "access": {"mode": "users", "users_file": str(tmp_path / "users")},
        "engine": {"threads": 1, "context": 6000, "device": "cpu"},
        "server": {"port": port, "temporary": str(tmp_path / "tmp")}, "records": {"directory": str(tmp_path / "records")},
        "page": {"max_tokens": 5000},
        # A random model writes gibberish and repeats itself; that is not what is tested here.
        "guardrails": {"checks": {"gibberish": {"enabled": False}, "repetition": {"enabled": False}, "rate": {"enabled": False}}}}))
    root = Path(__file__).parents[2]
    log = (tmp_path / "log").open("w")
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
        driver = subprocess.run([TOOLS, Path(__file__).with_name("browser.py"), url, shots, "correct horse"],
                                capture_output=True, text=True, timeout=500)
        assert driver.returncode == 0, driver.stderr + (tmp_path / "log").read_text()
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == -signal.SIGTERM  # uvicorn ends in order, then lets the signal have its way
        log.close()
    seen = json.loads(driver.stdout)
    assert seen["outside"] == [] and seen["errors"] == []
    assert seen["refused"] and seen["refused_at"] == seen["still_out"] == "/login" and seen["login_width"] <= 390
    assert seen["streamed"] and seen["stopped"] == seen["after_stop"] != ""
    assert seen["retried"] and seen["messages"] == 1
    assert seen["question"] == "Does zinc shorten a cold?" and seen["messages_after_edit"] == 1
    assert seen["edited"] and seen["edited"] != seen["retried"]
    assert "tokens/s" in seen["facts"] and "yes" in seen["facts"] and "demo-0123456789" in seen["facts"]
    assert "change the instructions" in seen["blocked"] and "guardrail" in seen["blocked_facts"]
    assert seen["left"] and seen["right"] and seen["left"] != seen["right"]
    assert "sha256" in seen["about"] and "Perplexity" in seen["about"] and "20.100" in seen["about"]
    assert "Is early mobilisation" in seen["export"] and "## Base" in seen["export"]
    assert seen["phone_width"] <= 390 and seen["phone_right"] <= 390 and seen["phone_answer"]
    assert sum(map(int, seen["dark"][4:-1].split(","))) < 200  # follows the device's dark setting
    votes = [line["vote"] for line in read_lines(tmp_path / "records", "feedback")]
    assert votes == ["up", "tuned"]
    assert "Traceback" not in (tmp_path / "log").read_text()
