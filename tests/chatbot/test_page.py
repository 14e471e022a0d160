"""The page in a real browser: login, streaming, stop, retry, edit, guardrail, feedback, side by side, export, phone.

Nothing is loaded from elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import Storage, browse, in_a_browser

from chatbot.access.users import hash_password
from chatbot.records.jsonl import read_lines


@in_a_browser
@pytest.mark.timeout(900)
def test_page(storage: Storage, tmp_path: Path) -> None:
    storage.add("demo-0123456789")
    shots = Path(os.environ.get("CHATBOT_SCREENSHOTS") or tmp_path)
    (tmp_path / "users").write_text(f"ann:{hash_password('correct horse')}\n")
    config = {
        "storage": str(storage.root), "serve": {"follow": "latest", "base": True},
        "access": {"mode": "users", "users_file": str(tmp_path / "users")},
        "engine": {"threads": 1, "context": 6000, "device": "cpu"},
        "records": {"directory": str(tmp_path / "records")},
        "page": {"max_tokens": 5000},
        # A random model writes gibberish and repeats itself; that is not what is tested here.
        "guardrails": {"checks": {"gibberish": {"enabled": False}, "repetition": {"enabled": False}, "rate": {"enabled": False}}}}
    seen = browse(tmp_path, config, "browser.py", shots, "correct horse", timeout_s=500)
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
