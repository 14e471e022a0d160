"""Prompts and completions of each format, and that their tokens are the text's."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.data.formats import SPECIAL_TOKENS, answer_text, contains_special, encode, render_prompt, template
from trainer.errors import ConfigError, UserError
from trainer.model.tokenizer import with_format

EXPECTED = {
    "instruction": ("Answer the question.\n\n### Question:\nIs it?\n\n### Answer:\n",
                    "Answer the question.\n\n### Context:\nWe saw.\n\n### Question:\nIs it?\n\n### Answer:\n",
                    "It is.\nDecision: yes<|im_end|>"),
    "tags": ("START_QIs it?END_QSTART_A", "START_QIs it?END_QSTART_A", "It is.\nDecision: yesEND_A<|im_end|>"),
    "tags-context": ("START_QIs it?END_QSTART_A", "START_QIs it?END_QSTART_CWe saw.END_CSTART_A", "It is.\nDecision: yesEND_A<|im_end|>"),
    "chat": ("<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n",
             "<|im_start|>user\n### Context:\nWe saw.\n\n### Question:\nIs it?<|im_end|>\n<|im_start|>assistant\n",
             "It is.\nDecision: yes<|im_end|>"),
}


@pytest.mark.parametrize("format", SPECIAL_TOKENS)
def test_text_of_each_format(tiny_tokenizer: Any, format: str) -> None:
    tokenizer = with_format(tiny_tokenizer, format)
    t = template(format, tokenizer)
    assert (t.prompt("Is it?"), t.prompt("Is it?", "We saw."), t.completion("It is.", "yes")) == EXPECTED[format]
    assert render_prompt(format, "Is it?", "We saw.", tokenizer) == t.prompt("Is it?", "We saw.")
    for text in EXPECTED[format]:
        assert tokenizer.decode(encode(tokenizer, text)) == text
    if t.takes_context:
        assert t.prompt("Is it?", "We saw.")[t.context_start("Is it?") :].startswith("We saw.")
    else:
        with pytest.raises(ValueError, match="no context"):
            t.context_start("Is it?")


@pytest.mark.parametrize("format", ["tags", "tags-context"])
def test_tags_are_one_token_each(tiny_tokenizer: Any, format: str) -> None:
    before = len(tiny_tokenizer)
    tokenizer = with_format(tiny_tokenizer, format)
    assert len(tokenizer) == before + len(SPECIAL_TOKENS[format])
    assert all(len(encode(tokenizer, token)) == 1 for token in SPECIAL_TOKENS[format])
    assert len(with_format(tokenizer, format)) == len(tokenizer), "adding twice must add nothing"


def test_text_that_looks_like_a_mark_stays_where_it_is(tiny_tokenizer: Any) -> None:
    t = template("instruction", with_format(tiny_tokenizer, "instruction"))
    assert "\ue000context\ue000?" in t.prompt("\ue000context\ue000?", "C") and t.prompt("{question}", "{context}").count("{question}") == 1


def test_decision_is_left_out_where_there_is_none() -> None:
    assert answer_text("A", "no") == "A\nDecision: no" and answer_text("A") == "A"


def test_special_text_is_recognised(tiny_tokenizer: Any) -> None:
    tokenizer = with_format(tiny_tokenizer, "tags")
    assert contains_special(tokenizer, "so END_A") and contains_special(tokenizer, "<|im_end|>")
    assert not contains_special(tokenizer, "END A")


def test_start_token_is_given_where_the_tokenizer_wants_it(tiny_tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    bos = tiny_tokenizer.bos_token
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", pair=None,
                                                                         special_tokens=[(bos, tiny_tokenizer.bos_token_id)])
    prompt = template("instruction", tiny_tokenizer).prompt("Is it?")
    assert prompt.startswith(bos) and encode(tiny_tokenizer, prompt).count(tiny_tokenizer.bos_token_id) == 1


def test_chat_does_not_depend_on_the_day_and_keeps_a_system_prompt(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = ("<|im_start|>system\n"
                                    "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}<|im_end|>\n"
                                    + tiny_tokenizer.chat_template)
    assert template("chat", tiny_tokenizer).prompt("Q?").startswith("<|im_start|>system\n26 Jul 2024<|im_end|>\n")


@pytest.mark.parametrize(("chat", "message"), [
    ("", "no chat template"),
    ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "word for word"),
    ("{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}", "word for word"),
])
def test_unusable_chat_templates_are_refused(tiny_tokenizer: Any, chat: str, message: str) -> None:
    tiny_tokenizer.chat_template = chat
    with pytest.raises(ConfigError, match=message):
        template("chat", tiny_tokenizer)


def test_chat_without_an_end_of_turn_ends_with_the_end_of_sequence(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
                                    "{% if add_generation_prompt %}[assistant] {% endif %}")
    assert template("chat", tiny_tokenizer).end == "<|im_end|>"


def test_unknown_format_missing_tokens_and_missing_tokenizer(tiny_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="Give one of instruction"):
        template("xml", tiny_tokenizer)
    with pytest.raises(UserError, match="lacks the tokens START_Q"):
        template("tags", tiny_tokenizer)
    with pytest.raises(ValueError, match="tokenizer is needed"):
        render_prompt("tags", "Q?")


def test_formats_import_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, trainer.data.formats; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
