"""What is written down, and what is not.

The audit has a line for each exchange: who (as a keyed hash), lengths, latencies, verdicts; no text. Feedback has the text that it is
about, since it is given to improve the model; personal data is redacted. Nothing else of a conversation is kept anywhere.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from pathlib import Path
from typing import Any

from chatbot.config import RecordsConfig
from chatbot.guardrails.personal import redact
from chatbot.records.jsonl import JsonLines, read_lines

log = logging.getLogger(__name__)

FEEDBACK, AUDIT = "feedback", "audit"
LONGEST_COMMENT = 2000


class Keeper:
    """Writes feedback and audit lines. A storage that does not take them is logged, and does not stop answers."""

    def __init__(self, config: RecordsConfig) -> None:
        directory = Path(config.directory) if config.directory else None
        self._feedback = JsonLines(directory, FEEDBACK, config.rotate_bytes) if directory and config.feedback else None
        self._audit = JsonLines(directory, AUDIT, config.rotate_bytes, config.keep_files) if directory and config.audit else None
        # Made anew in every process: the same user has the same hash within one file, and nobody can compute it afterwards.
        self._key = secrets.token_bytes(32)

    @property
    def takes_feedback(self) -> bool:
        return self._feedback is not None

    def hashed(self, text: str) -> str:
        """A keyed hash that cannot be undone by trying likely texts."""
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()[:16] if text else ""

    def audit(self, line: dict[str, Any]) -> None:
        """Keep an audit line; blocks for the write."""
        if self._audit:
            try:
                self._audit.append({"time": round(time.time(), 3), **line})
            except OSError as error:
                log.error("the audit line was not kept: %s", error)

    def feedback(self, line: dict[str, Any]) -> bool:
        """Keep feedback with its texts redacted; False if it was not kept."""
        if not self._feedback:
            return False
        cleaned = {k: redact(v)[0] if isinstance(v, str) else v for k, v in line.items()}
        cleaned["comment"] = str(cleaned.get("comment") or "")[:LONGEST_COMMENT]
        try:
            self._feedback.append({"time": round(time.time(), 3), **cleaned})
        except OSError as error:
            log.error("feedback was not kept: %s", error)
            return False
        return True


def preferences(directory: Path) -> list[dict[str, Any]]:
    """Feedback as preference data.

    A vote between two answers gives {prompt, chosen, rejected}; a thumb gives {prompt, completion, label} (the form that KTO takes).
    A later thumb on the same answer replaces the earlier.
    """
    last: dict[str, dict[str, Any]] = {}
    for line in read_lines(directory, FEEDBACK):
        last[str(line.get("exchange"))] = line
    rows: list[dict[str, Any]] = []
    for line in last.values():
        about = {"prompt": line.get("question", ""), "context": line.get("context", ""), "run": line.get("run", "")}
        if line.get("vote") in ("tuned", "base"):
            other = "base" if line["vote"] == "tuned" else "tuned"
            rows.append({**about, "chosen": line.get(f"answer_{line['vote']}", ""), "rejected": line.get(f"answer_{other}", "")})
        elif line.get("vote") in ("up", "down"):
            rows.append({**about, "completion": line.get("answer", ""), "label": line["vote"] == "up", "model": line.get("model", "")})
    return rows
