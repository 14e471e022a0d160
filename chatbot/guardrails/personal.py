"""Personal data: found by form and checked by checksum where the form has one, replaced by its kind in brackets."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from chatbot.config import check
from chatbot.guardrails.base import Finding, Stage, Subject


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def luhn(text: str) -> bool:
    """Checksum of payment cards."""
    digits = [int(c) for c in _digits(text)]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    return sum(d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(reversed(digits))) % 10 == 0


def iban(text: str) -> bool:
    """Checksum of bank accounts (ISO 13616)."""
    plain = re.sub(r"\s", "", text).upper()
    moved = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


def nhs(text: str) -> bool:
    """Checksum of the NHS number (ten digits, modulus 11)."""
    digits = [int(c) for c in _digits(text)]
    if len(digits) != 10:
        return False
    value = 11 - sum(d * w for d, w in zip(digits, range(10, 1, -1), strict=False)) % 11
    return value != 10 and value % 11 == digits[9]


def ssn(text: str) -> bool:
    """A US social security number that can have been given out."""
    a, b, c = _digits(text)[:3], _digits(text)[3:5], _digits(text)[5:]
    return a not in ("000", "666") and a < "900" and b != "00" and c != "0000"


def address(text: str) -> bool:
    """An IP address of a host (not 0.0.0.0 and the like, not a version number such as 1.2.3.4 in `version 1.2.3.4`)."""
    try:
        value = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (value.is_unspecified or value.is_loopback)


def phone(text: str) -> bool:
    """Enough digits for a telephone number and not only years or ranges."""
    count = len(_digits(text))
    return 9 <= count <= 15 and not re.fullmatch(r"(?:19|20)\d\d\W+(?:19|20)\d\d", text.strip())


NAME = r"[A-Z][a-zà-öø-ÿ'’-]+(?:\s+(?:[A-Z]\.|(?:de|van|von|der|la|bin|al)|[A-Z][a-zà-öø-ÿ'’-]+)){0,3}"
MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*"
DATE = (rf"(?:\d{{1,2}}[./-]\d{{1,2}}[./-](?:19|20)?\d\d|(?:19|20)\d\d-\d\d-\d\d|"
        rf"\d{{1,2}}\.?\s+{MONTH}\.?,?\s+(?:19|20)\d\d|{MONTH}\.?\s+\d{{1,2}},?\s+(?:19|20)\d\d)")


@dataclass(frozen=True)
class Kind:
    """A kind of personal data."""

    name: str
    pattern: re.Pattern[str]
    valid: Callable[[str], bool] = lambda _: True
    group: int = 0


KINDS = (
    Kind("email", re.compile(r"(?<![\w.+-])[\w.+-]{1,64}\s?(?:@|\(at\)|\[at\])\s?[\w-]+(?:\s?(?:\.|\(dot\)|\[dot\])\s?[\w-]+)*"
                             r"(?:\.|\s?\(dot\)\s?|\s?\[dot\]\s?)[A-Za-z]{2,}")),
    Kind("url", re.compile(r"\bhttps?://[^\s/@]+:[^\s/@]+@\S+")),
    Kind("iban", re.compile(r"\b[A-Z]{2}\d{2}(?:\s?[A-Z0-9]{4}){2,7}(?:\s?[A-Z0-9]{1,3})?\b"), iban),
    Kind("card", re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.]*\d)"), luhn),
    Kind("ssn", re.compile(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])"), ssn),
    Kind("ssn", re.compile(r"(?i)\b(?:ssn|social security(?: number| no\.?)?)(?:\s+is)?[\s:#]*(\d{3}[ -]?\d{2}[ -]?\d{4})\b"), group=1),
    Kind("nhs", re.compile(r"(?i)\bnhs(?:\s+(?:number|no\.?))?(?:\s+is)?[\s:#]*(\d{3}[ -]?\d{3}[ -]?\d{4})\b"), nhs, 1),
    Kind("record", re.compile(r"(?i)\b(?:mrn|medical record(?: number| no\.?)?|patient(?:'s)? (?:id|number)|hospital number|chart number|"
                              r"insurance (?:id|number)|policy number|passport(?: number| no\.?)?|driver'?s? licen[cs]e(?: number| no\.?)?|"
                              r"national id(?: number)?)(?:\s+is)?[\s:#]*([A-Z]{0,3}[- ]?\d[\dA-Z-]{4,})\b"), group=1),
    Kind("birth", re.compile(rf"(?i)\b(?:born(?:\s+on)?|dob|d\.o\.b\.?|date of birth|birth ?date|birthday)(?:\s+is)?"
                             rf"[\s:]*(?:the\s+)?({DATE})"), group=1),
    Kind("ip", re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\w)|(?<![\w:])(?:[0-9a-fA-F]{1,4}:){4,7}[0-9a-fA-F]{1,4}(?![\w:])"),
         address),
    Kind("phone", re.compile(r"(?<![\w.+])\+\d{1,3}[\s.-]?(?:\(\d{1,4}\)[\s.-]?)?\d(?:[\s.-]?\d){6,12}(?!\w)"), phone),
    Kind("phone", re.compile(r"(?<![\w.-])(?:\(\d{3}\)\s?|\d{3}[-.])\d{3}[-.]\d{4}(?![\w-])"), phone),
    Kind("phone", re.compile(r"(?i)\b(?:phone|telephone|tel\.?|mobile|cell|call me(?: on| at)?|whatsapp|fax)"
                             r"(?: number| no\.?)?(?:\s+is)?[\s:#]*"
                             r"(\(?\d[\d\s().-]{6,16}\d)"), phone, 1),
    Kind("name", re.compile(rf"\b(?:[Mm]y name is|I am called|"
                            rf"[Mm]y (?:wife|husband|son|daughter|mother|father|partner|brother|sister) is called|"
                            rf"[Pp]atient(?:'s)? name(?: is|:)?|[Nn]ame:|[Pp]atient:)\s+({NAME})"), group=1),
    Kind("name", re.compile(rf"\b(?:Mr|Mrs|Ms|Miss|Mx)\.?\s+({NAME})"), group=1),
    Kind("address", re.compile(r"\b\d{1,5}\s+(?:[A-Z][a-z]+\s+){1,3}(?:Street|St|Avenue|Ave|Road|Rd|"
                               r"Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct|Way|Close|"
                               r"Square|Terrace)\b\.?(?:,\s*(?:Apt|Apartment|Unit|Flat)\.?\s*\w+)?")),
)
GROWING = re.compile(r"(?:[\w.+-]+\s?(?:@|\(at\)|\[at\])[\w.()\[\]\s-]{0,40}|[\w.+-]+|[+(]?\d[\d\s().:/-]*|\b[A-Z]{2}\d{2}[A-Z0-9 ]*)$")
"""The end of a text that may still grow into personal data: it is held back until it has."""
SAYS = re.compile(r"(?i)\b(?:name(?: is|:)|(?:is|am) called|patient:|m(?:r|rs|s|iss|x)\b|born|d\.?o\.?b\b|date of birth|"
                  r"birth ?da(?:te|y)|ssn|social security|nhs|mrn|record|patient(?:'s)? (?:id|number)|(?:hospital|chart|policy) number|"
                  r"insurance|passport|licen[cs]e|national id|phone|telephone|tel|mobile|cell|call me|whatsapp|fax)(?![a-z])[^\n]{0,40}$")
"""Words that say what follows them, and what does: held back together until the line ends or 40 characters have come."""
LOOKED_BACK = 300
"""Characters of an answer before its next part that are looked at with it."""


@dataclass(frozen=True)
class PersonalDataSettings:
    """Kinds that are replaced."""

    enabled: bool = True
    kinds: list[str] = field(default_factory=lambda: sorted({k.name for k in KINDS}))
    stages: list[str] = field(default_factory=lambda: ["input", "output"])

    def __post_init__(self) -> None:
        known = sorted({k.name for k in KINDS})
        check(set(self.kinds) <= set(known), "kinds", self.kinds, f"Use {', '.join(known)}.")
        check(set(self.stages) <= {"input", "output"} and bool(self.stages), "stages", self.stages, "Give input, output or both.")


def spans(text: str, kinds: set[str] | None = None) -> list[tuple[int, int, str]]:
    """(start, end, kind) of personal data, in order, none overlapping (the earlier kind in KINDS wins)."""
    found: list[tuple[int, int, str]] = []
    for kind in KINDS:
        if kinds is not None and kind.name not in kinds:
            continue
        for match in kind.pattern.finditer(text):
            start, end = match.span(kind.group)
            if kind.valid(match[kind.group]) and not any(start < e and s < end for s, e, _ in found):
                found.append((start, end, kind.name))
    return sorted(found)


def redact(text: str, kinds: set[str] | None = None, given: int = 0) -> tuple[str, list[str]]:
    """The text with personal data replaced by `[email]` and so on, and the kinds found.

    `given`: so many characters have been shown already; the text behind them is returned. They still say what follows them (`My name
    is`). Looked through again until nothing is found: what stands right behind something else (`a@b.org+442079460958`) shows only when
    that is gone.
    """
    names: list[str] = []
    while found := spans(text, kinds):
        out, at, shown = [], 0, given
        for start, end, kind in found:
            out.append(text[at:start])
            if end <= given:
                out.append(f"[{kind}]")
                shown += len(out[-1]) - (end - start)
            elif start < given:  # it began in the part that was shown: nothing more of it, and nothing in its place
                out.append(text[start:given])
            else:
                out.append(f"[{kind}]")
            at = end
            names += [kind] if end > given else []
        text, given = "".join(out) + text[at:], shown
    return text[given:], names


class PersonalDataCheck:
    """Redacts personal data before the model and before anything is recorded, and in answers."""

    name = "personal-data"

    def __init__(self, settings: PersonalDataSettings) -> None:
        self.settings = settings
        self.stages: frozenset[Stage] = frozenset(settings.stages)  # type: ignore[arg-type]
        self.kinds = set(settings.kinds)

    async def look(self, subject: Subject) -> Finding | None:
        cut = max(0, subject.given - LOOKED_BACK)
        text, names = redact(subject.text[cut:], self.kinds, subject.given - cut)
        return Finding("redact", text, ", ".join(sorted(set(names)))) if names else None

    def holds_back(self, text: str) -> int:
        """How many characters at the end may still grow into personal data."""
        return max(len(match[0]) if (match := pattern.search(text[-80:])) else 0 for pattern in (GROWING, SAYS))
