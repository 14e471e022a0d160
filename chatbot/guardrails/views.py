"""A text as it is meant, whatever it is dressed up as.

`clean` is what the model gets: visible characters only, nothing else changed (NFC: `m²` and `10⁻³` keep their meaning).
`views` is what patterns are matched against: the text folded (compatibility forms, look-alike letters of other scripts, case,
accents, digits for letters), runs of single letters joined, base64, hexadecimal, percent and rot13 text decoded, and reversed.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import re
import unicodedata
from dataclasses import dataclass
from urllib.parse import unquote

LOOKALIKES = str.maketrans({
    # Cyrillic
    "а": "a", "в": "b", "с": "c", "ԁ": "d", "е": "e", "ѐ": "e", "ё": "e", "ғ": "f", "һ": "h", "н": "h", "і": "i", "ї": "i", "ј": "j",
    "к": "k", "ӏ": "l", "м": "m", "п": "n", "о": "o", "р": "p", "ԛ": "q", "г": "r", "ѕ": "s", "т": "t", "ц": "u", "ѵ": "v", "ԝ": "w",
    "х": "x", "у": "y", "ү": "y", "з": "3", "ь": "b", "я": "r", "и": "n",
    # Greek
    "α": "a", "β": "b", "ϲ": "c", "ε": "e", "η": "n", "ι": "i", "κ": "k", "ν": "v", "ο": "o", "ρ": "p", "σ": "o", "τ": "t", "υ": "u",
    "χ": "x", "γ": "y", "ω": "w", "μ": "u", "ζ": "z",
    # Armenian, Latin extensions and others
    "ա": "w", "օ": "o", "ս": "u", "հ": "h", "ց": "g", "ɑ": "a", "ɡ": "g", "ı": "i", "ȷ": "j", "ʟ": "l", "ɴ": "n", "ʀ": "r", "ꜱ": "s",
    "ᴀ": "a", "ʙ": "b", "ᴄ": "c", "ᴅ": "d", "ᴇ": "e", "ꜰ": "f", "ɢ": "g", "ʜ": "h", "ɪ": "i", "ᴊ": "j", "ᴋ": "k", "ᴍ": "m", "ᴏ": "o",
    "ᴘ": "p", "ᴛ": "t", "ᴜ": "u", "ᴠ": "v", "ᴡ": "w", "ʏ": "y", "ᴢ": "z", "ø": "o", "ł": "l", "đ": "d", "ħ": "h", "ß": "ss", "æ": "ae",
})
LEET = str.maketrans("0134578@$!|", "oieastbasil")
MIXED = re.compile(r"[a-z]*(?:[a-z][0134578@$!|]|[0134578@$!|][a-z])[a-z0134578@$!|]*")
"""A word with digits or signs among its letters."""
SPACED = re.compile(r"(?<!\w)(?:\w[\s.\-_*|/,·•'’]{1,3}){3,}\w(?!\w)")
"""Four or more single characters with the same little between them."""
BASE64 = re.compile(r"(?<![\w+/=-])[A-Za-z0-9+/_-]{12,}={0,2}")
HEX = re.compile(r"(?<!\w)(?:0x)?(?:[0-9a-fA-F]{2}[\s:]?){8,}(?!\w)")
CONTROL_SPACES = re.compile(r"[\x0b\x0c\x1c-\x1f\x85]")
"""Control characters that part words: a space stands in their place, where others are taken out."""
LONGEST = 20_000
"""Characters that are looked at in decoded and reversed forms."""
LONGEST_JOINED = 300
"""Characters of a run of single letters that are looked at (patterns over text without spaces are slow)."""


@dataclass(frozen=True)
class View:
    """One reading of a text."""

    kind: str
    text: str
    joined: bool = False
    """The spaces between words are lost."""


def invisible(character: str) -> bool:
    """Not seen when printed: format characters, controls, tags, fillers. Line breaks and tabs are seen."""
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cf", "Cc", "Cs", "Co") or character in "\u115f\u1160\u3164\uffa0\u2800\u034f\u17b4\u17b5" \
        or "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"


def clean(text: str) -> str:
    """The visible text, in NFC, with line ends as one newline."""
    text = unicodedata.normalize("NFC", _parted(text))
    # Once more: a mark may have been kept from its letter by what was invisible between them.
    return unicodedata.normalize("NFC", "".join(c for c in text if not invisible(c)))


def _parted(text: str) -> str:
    return CONTROL_SPACES.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n"))


def fold(text: str) -> str:
    """Lower case Latin letters for whatever looks like them, single spaces."""
    text = "".join(c for c in unicodedata.normalize("NFKC", _parted(text)) if not invisible(c)).casefold()
    if any("\u0370" <= c <= "\u058f" for c in text):
        # A word wholly in another script is that language's own word: only mixed words, and words of text that is mostly Latin,
        # are disguises.
        latin = sum("a" <= c <= "z" for c in text)
        other = sum("\u0370" <= c <= "\u058f" for c in text)
        text = re.sub(r"\w+", lambda m: m[0].translate(LOOKALIKES) if latin > other or re.search("[a-z]", m[0]) else m[0], text)
    else:
        text = text.translate(LOOKALIKES)
    text = unicodedata.normalize("NFC", "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn"))
    text = text.translate({0x2018: "'", 0x2019: "'", 0x201c: '"', 0x201d: '"', 0x2013: "-", 0x2014: "-"})
    return re.sub(r"\s+", " ", text).strip()


def _readable(data: bytes) -> str:
    """Decoded bytes as text if they are text, else nothing."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    good = sum(c.isalpha() or c in " \n.,'?!-" for c in text)
    return text if len(text) >= 6 and good >= 0.85 * len(text) else ""


def decoded(text: str) -> list[str]:
    """Readable texts hidden in base64, hexadecimal or percent encoding."""
    found = []
    for match in BASE64.finditer(text):
        word = match[0].rstrip("=").replace("-", "+").replace("_", "/")
        try:
            found.append(_readable(base64.b64decode(word + "=" * (-len(word) % 4), validate=True)))
        except (binascii.Error, ValueError):
            continue
    for match in HEX.finditer(text):
        digits = re.sub(r"0x|[\s:]", "", match[0])
        found.append(_readable(bytes.fromhex(digits[:len(digits) // 2 * 2])))
    if text.count("%") >= 3:
        found.append(unquote(text))
    return [f for f in found if f and f != text]


def views(text: str) -> list[View]:
    """Every reading of a text, the folded one first; none twice."""
    plain = fold(text)
    found = [View("plain", plain)]
    if mixed := len(MIXED.findall(plain)):
        letters = MIXED.sub(lambda m: m[0].translate(LEET), plain)
        # Among several such words a digit by itself is a word too: `1 4m 4 m4n`.
        found.append(View("leet", re.sub(r"(?<!\S)[014](?!\S)", lambda m: m[0].translate(LEET), letters) if mixed > 1 else letters))
    short = text[:LONGEST]
    folded = "".join(c for c in unicodedata.normalize("NFKC", short) if not invisible(c)).casefold()
    for match in SPACED.finditer(folded):
        joined = re.sub(r"[\W_]+", "", match[0].translate(LOOKALIKES)).translate(LEET)
        found.append(View("spaced", joined[:LONGEST_JOINED], joined=True))
    together = SPACED.sub(lambda m: re.sub(r"[\W_]+", "", m[0]), folded)
    if together != folded:  # a single word pulled apart, among words that are not
        found.append(View("leet", MIXED.sub(lambda m: m[0].translate(LEET), fold(together))))
    for inner in decoded(short):
        found.append(View("decoded", fold(inner)))
        found.extend(View("decoded twice", fold(again)) for again in decoded(inner))
    found.append(View("rot13", codecs.encode(plain[:LONGEST], "rot13")))
    found.append(View("reversed", plain[:LONGEST][::-1]))
    seen: set[str] = set()
    return [v for v in found if not (v.text in seen or seen.add(v.text))]  # type: ignore[func-returns-value]
