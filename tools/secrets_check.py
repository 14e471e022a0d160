"""Refuses what looks like a secret in files that git keeps.

Secrets are Kubernetes Secrets that exist already and are named; docs/promotion.md shows how External Secrets or Sealed Secrets make them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """Something wrong in a file."""

    path: Path
    line: int
    message: str

    def text(self, root: Path) -> str:
        """`file:line: message`, as editors and CI understand it."""
        path = self.path.relative_to(root) if self.path.is_relative_to(root) else self.path
        return f"{path}:{self.line}: {self.message}"


TOKENS = (
    ("Hugging Face token", r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"),
    ("GitHub token", r"\bgh[opsur]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"),
    ("GitLab token", r"\bgl(?:pat|dt|rt|ptt|soat)-[\w-]{16,}"),
    ("AWS key", r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    ("Google key", r"\bAIza[\w-]{35}"),
    ("Slack token", r"\bxox[abeoprs]-[\w-]{10,}"),
    ("API key", r"\bsk-[A-Za-z0-9_-]{20,}"),
    ("Weights & Biases key", r"(?i)\bwandb[\w.-]*\s*[:=]\s*['\"]?[0-9a-f]{40}\b"),
    ("JSON web token", r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"),
    ("private key", r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    ("password in a URL", r"\b[a-z][a-z0-9+.-]*://[^\s/:@'\"{}$]+:[^\s/@'\"{}$]+@"),
)

NAMED = re.compile(r"""(?ix) ^[\s{,-]* ["']?
    (?P<key>[\w.-]*(?:token|password|passwd|secret|api[_-]?key|private[_-]?key|access[_-]?key|credentials?))
    ["']? \s* [:=] \s* (?P<value>\S.*?) [\s}\]]*$""")
"""A key that is called like a secret, with text beside it."""

REFERENCE = re.compile(r"(?i)^(?:[|>][+-]?|[{\[].*|\$\{?\w+.*|null|~|true|false|[\d.]+|\"\"|''|&\w+|\*\w+|#.*)$")
"""Beside such a key, this is no secret: a mapping, a list, a variable, a number."""

KUBERNETES_NAME = re.compile(r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")
"""The name of a Secret or of a key in one."""

LONG = re.compile(r"(?<![\w+/=.-])[A-Za-z0-9+/_-]{32,}={0,2}(?![\w+/=.-])")
DIGEST = re.compile(r"^[0-9a-f]+$")
ENTROPY = 4.0
"""Bits a character above which a long word is random: words and paths lie below 3.9, base64 of random bytes above 4.5."""


def entropy(text: str) -> float:
    """Shannon entropy in bits a character."""
    counts = Counter(text)
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())


def _hide(text: str) -> str:
    return f"{text[:4]}... ({len(text)} characters)"


def _named_secret(content: str) -> tuple[str, str] | None:
    """Key and value of the first pair in a line (block or flow style) that is called like a secret and holds text."""
    for pair in re.split(r"[{,]\s", re.sub(r"(?<!\$){", "{ ", content)):
        named = NAMED.match(pair)
        if named and not REFERENCE.match(named["value"]):
            value = named["value"].strip("\"'")
            if not KUBERNETES_NAME.match(value):
                return named["key"], value
    return None


def findings_of(path: Path, text: str) -> Iterator[Finding]:
    """What looks like a secret in a file's text, at most one finding a line; the secret itself is not repeated."""
    remedy = "Put it into a Kubernetes Secret and name the Secret here (docs/promotion.md)."
    for number, line in enumerate(text.splitlines(), 1):
        for what, pattern in TOKENS:
            if found := re.search(pattern, line):
                yield Finding(path, number, f"{_hide(found.group())} looks like a {what}. {remedy}")
                break
        else:
            content = line.split(" #", 1)[0]
            if content.lstrip().startswith("#"):
                content = ""
            if named := _named_secret(content):
                yield Finding(path, number, f"{named[0]} holds text ({_hide(named[1])}). {remedy}")
                continue
            for word in LONG.findall(content):
                if not DIGEST.match(word) and "/" not in word.strip("/")[:24] and entropy(word) > ENTROPY:
                    yield Finding(path, number, f"{_hide(word)} looks like a random secret. {remedy}")
                    break


def scan(root: Path, folders: Sequence[str]) -> list[Finding]:
    """Findings in every text file below the folders of a checkout."""
    findings: list[Finding] = []
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file():
                findings += findings_of(path, path.read_text(encoding="utf-8", errors="replace"))
    return findings
