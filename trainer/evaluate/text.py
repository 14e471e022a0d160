"""Agreement of a generated answer with the reference: token-F1 and ROUGE-L, and the normal form in which rows are compared.

Pure Python without imports of the trainer, so that `make promote` and the tests can use it anywhere.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ROUGE_WORDS = re.compile(r"[a-z0-9]+")
_WORDS = re.compile(r"\w+")


def squad_words(text: str) -> list[str]:
    """Words after SQuAD's normalisation: lower case, ASCII punctuation and articles removed, split at white space.

    Source: `normalize_answer` of the SQuAD v1.1 evaluation script (Rajpurkar et al. 2016).
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(prediction: str, reference: str) -> float:
    """SQuAD's F1 over the bags of words, 0 to 1. Two empty texts agree (1), an empty and a non-empty one don't (0)."""
    predicted, expected = squad_words(prediction), squad_words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected))


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel: O(len(b)) operations on integers of len(a) bits.

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited" (2004).
    """
    masks: dict[str, int] = {}
    for i, word in enumerate(a):
        masks[word] = masks.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    vector = full
    for word in b:
        matches = vector & masks.get(word, 0)
        vector = (vector + matches | vector - matches) & full
    return len(a) - vector.bit_count()


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure (Lin 2004) over lower-case ASCII words, without stemming: what the `rouge-score` package computes."""
    predicted, expected = _ROUGE_WORDS.findall(prediction.lower()), _ROUGE_WORDS.findall(reference.lower())
    if not predicted or not expected:
        return 0.0
    return 2 * lcs_length(predicted, expected) / (len(predicted) + len(expected))


def plain_words(text: str) -> list[str]:
    """Words for comparing rows with each other: compatibility form (NFKC), case folded, without punctuation, in any script."""
    return _WORDS.findall(unicodedata.normalize("NFKC", text).casefold().replace("_", " "))


def repetition(text: str, n: int = 4) -> float:
    """Share of the n-grams of words that occurred before in the text: near 0 in prose, towards 1 in a loop."""
    words = plain_words(text)
    grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
