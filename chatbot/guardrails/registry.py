"""All checks by name, in the order in which they look, with their settings from the configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from chatbot.config import GuardrailsConfig, build, check
from chatbot.errors import ConfigError
from chatbot.guardrails import answer, personal, plain, remote
from chatbot.guardrails.base import Check
from chatbot.guardrails.patterns import PatternCheck, Settings, rule_files

ORDER = ("rate", "length", "unicode", "crisis", "emergency", "injection", "unsafe", "referral", "personal-data", "repetition", "gibberish",
         "safety-model", "nemo")
"""Limits first (cheap), then what a person in need must get, then what is refused, then redaction of what goes on, then
what is asked elsewhere."""

BUILT_IN: dict[str, tuple[type, type]] = {
    "rate": (plain.RateCheck, plain.RateSettings),
    "length": (plain.LengthCheck, plain.LengthSettings),
    "unicode": (plain.UnicodeCheck, plain.UnicodeSettings),
    "personal-data": (personal.PersonalDataCheck, personal.PersonalDataSettings),
    "repetition": (answer.RepetitionCheck, answer.RepetitionSettings),
    "gibberish": (answer.GibberishCheck, answer.GibberishSettings),
    "safety-model": (remote.SafetyModelCheck, remote.SafetyModelSettings),
    "nemo": (remote.NemoCheck, remote.NemoSettings),
}
"""Checks made of code: class and settings. The others are made of patterns (rules/*.yaml)."""


def fixed_texts(own: dict[str, str]) -> dict[str, str]:
    """The fixed texts, the configuration's own in place of the built-in ones. Raises ConfigError for an unknown name."""
    texts: dict[str, str] = yaml.safe_load((Path(__file__).parent / "texts.yaml").read_text(encoding="utf-8"))
    for name, text in own.items():
        check(name in texts, f"guardrails.texts.{name}", text, f"There is no such text; there are {', '.join(texts)}.")
    return {**texts, **own}


def make_checks(config: GuardrailsConfig) -> list[Check]:
    """The enabled checks in order. Raises ConfigError naming the check and the setting."""
    files = rule_files()
    texts = fixed_texts(config.texts)
    names = [n for n in ORDER if n in BUILT_IN or n in files]
    for name, settings in config.checks.items():
        check(name in names, f"guardrails.checks.{name}", settings, f"There is no such check; there are {', '.join(names)}.")
    made: list[Check] = []
    for name in names:
        own: dict[str, Any] = config.checks.get(name) or {}
        where = f"guardrails.checks.{name}"
        try:
            if name in BUILT_IN:
                kind, kind_settings = BUILT_IN[name]
                settings = build(kind_settings, own, where)
                if settings.enabled:
                    made.append(kind(settings))
            else:
                settings = build(Settings, {**files[name], **own}, where)
                check(settings.text in texts, "text", settings.text, f"There is no such text; there are {', '.join(texts)}.")
                if settings.enabled:
                    made.append(PatternCheck(name, settings))
        except ConfigError as error:
            if error.field.startswith(where):
                raise
            raise ConfigError(f"{where}.{error.field}", error.value, str(error).partition(" is not usable. ")[2]) from None
    return made


def describe(config: GuardrailsConfig) -> list[dict[str, Any]]:
    """The enabled checks for people: name, stages, settings."""
    return [{"check": c.name, "stages": sorted(c.stages), "settings": dataclasses.asdict(c.settings)}  # type: ignore[attr-defined]
            for c in make_checks(config)]
