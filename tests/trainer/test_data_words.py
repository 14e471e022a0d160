"""Word by word, a text has exactly the tokens that the tokenizer itself gives it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from trainer.data import words
from trainer.data.words import WordEncoder

SAMPLE = Path(__file__).resolve().parents[2] / "trainer/data/sample/pubmedqa-sample.jsonl"
TEXTS = [text for line in SAMPLE.read_text(encoding="utf-8").splitlines() for row in [json.loads(line)]
         for text in (row["question"], *row["contexts"], row["long_answer"])]
LLAMA3, QWEN, _ = sorted(words.PATTERNS, key=lambda p: (r"\p{N}{1,3}" not in p, "(?i" not in p))


def _trained(steps: Any, normalizer: Any = None, special: tuple[Any, ...] = ("<s>", "</s>"), alphabet: bool = True) -> Tokenizer:
    """A BPE tokenizer of the sample's words."""
    made = Tokenizer(models.BPE(unk_token=None if alphabet else "<s>", fuse_unk=not alphabet))
    if normalizer is not None:
        made.normalizer = normalizer
    if steps is not None:
        made.pre_tokenizer = steps
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=1500, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else []))
    return made


def byte_level() -> Tokenizer:
    return _trained(pre_tokenizers.ByteLevel(add_prefix_space=False))


def smollm() -> Tokenizer:
    return _trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                             pre_tokenizers.ByteLevel(add_prefix_space=False)]))


def split_by(pattern: str) -> Tokenizer:
    return _trained(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]), normalizers.NFC())


def metaspace() -> Tokenizer:
    return _trained(pre_tokenizers.Metaspace(prepend_scheme="first"), alphabet=False)


def llama2() -> Tokenizer:
    """Trained on words, then without a step that cuts, as Llama 2's is defined."""
    definition = json.loads(_trained(pre_tokenizers.Metaspace(), alphabet=False).to_str())
    definition["pre_tokenizer"] = None
    definition["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                                                                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    return Tokenizer.from_str(json.dumps(definition))


KNOWN: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "byte-level": (byte_level, " "), "SmolLM": (smollm, " "), "Llama 3": (lambda: split_by(LLAMA3), " "),
    "Qwen": (lambda: split_by(QWEN), " "),
    "Metaspace": (metaspace, ""), "Llama 2": (llama2, "")}
MADE = {name: make() for name, (make, _) in KNOWN.items()}

PIECES = st.sampled_from([
    " ", "  ", "\n", "\n\n", "\t", " \n", "\r\n", "\u00a0", "\u2003", "a", "it's", "'s", "'LL", "Word", "1", "23", "4567", ".", ",", "?!",
    "<s>", "</s>", "▁", "Ġ", "é", "e\u0301", "\u0301", "ß", "ſ", "µg", "±", "漢字", "🙂", "\u200d", "-", "--", "(", ")", "###",
    "Answer:", "\x7f", "_"])


@pytest.mark.parametrize("name", KNOWN)
def test_known_families_are_cut(name: str) -> None:
    encoder = WordEncoder(MADE[name])
    assert encoder.before == KNOWN[name][1]
    for text in TEXTS:
        assert encoder.ids(text).tolist() == MADE[name].encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", KNOWN)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pieces=st.lists(PIECES | st.text(max_size=4), max_size=24))
@example(pieces=["a </s>", " b"])
@example(pieces=["<s> a", " <s> ", "b"])
@example(pieces=["a", " ", "\u0301", " ", "b"])
@example(pieces=["a", " ", "b", "  ", "c", " "])
def test_any_text(name: str, pieces: list[str]) -> None:
    for text in ("".join(pieces), " ".join(pieces)):
        text = text.encode("utf-8", "ignore").decode()  # a lone surrogate is refused before
        encoder, whole = WordEncoder(MADE[name]), MADE[name].encode(text, add_special_tokens=False)
        assert encoder.ids(text).tolist() == whole.ids
        assert encoder.spans(text) == whole.offsets


def _with_added(**flags: bool) -> Tokenizer:
    made = byte_level()
    made.add_tokens([AddedToken("<mark>", **flags)])
    return made


def _crossing() -> Tokenizer:
    """Llama 2's form, but a token reaches over a space."""
    definition = json.loads(llama2().to_str())
    definition["model"]["vocab"]["e▁"] = len(definition["model"]["vocab"])
    definition["model"]["merges"].append(["e", "▁"])
    return Tokenizer.from_str(json.dumps(definition))


OTHERS: dict[str, Callable[[], Tokenizer]] = {
    "token that takes the space before it": lambda: _with_added(lstrip=True),
    "token that takes the space behind it": lambda: _with_added(rstrip=True),
    "token only as a whole word": lambda: _with_added(single_word=True),
    "another pattern": lambda: split_by(r"\w+ \w+|."),
    "merges over spaces": _crossing,
    "a normaliser that changes letters": lambda: _trained(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Lowercase()),
    "a space before every text": lambda: _trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no pattern": lambda: _trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "word pieces": lambda: Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_get_their_texts_whole(name: str) -> None:
    tokenizer = OTHERS[name]()
    encoder = WordEncoder(tokenizer)
    assert encoder.before is None
    for text in ("the one <mark> a b", *TEXTS[:20]):
        assert encoder.ids(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "WORDS", 50)
    encoder, chosen = WordEncoder(MADE["Llama 3"]), random.Random(0)
    for _ in range(300):
        text = " ".join("".join(chosen.choices("abcdefgh", k=chosen.randint(1, 100))) for _ in range(8))
        assert encoder.ids(text).tolist() == MADE["Llama 3"].encode(text, add_special_tokens=False).ids
        assert len(encoder._later) <= 50
    assert max(map(len, encoder._later)) <= words.LONGEST
