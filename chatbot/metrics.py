"""Figures for Prometheus. One registry a process's application, so that tests do not share them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

TIMES = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
SPEEDS = (1, 2, 5, 10, 20, 40, 80, 160, 320)


class Metrics:
    """All figures of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.answers = Counter("chatbot_answers", "Answers by model and how they ended.", ["model", "reason"], registry=self.registry)
        self.tokens = Counter("chatbot_tokens", "Tokens of prompts and answers.", ["model", "kind"], registry=self.registry)
        self.first = Histogram("chatbot_first_token_seconds", "From the question to the first token.", ["model"], buckets=TIMES,
                               registry=self.registry)
        self.wait = Histogram("chatbot_wait_seconds", "From the question until a place was free.", ["model"], buckets=TIMES,
                              registry=self.registry)
        self.speed = Histogram("chatbot_tokens_per_second", "Speed of one answer after its first token.", ["model"], buckets=SPEEDS,
                               registry=self.registry)
        self.verdicts = Counter("chatbot_guardrail", "What the checks found.", ["check", "stage", "action"], registry=self.registry)
        self.errors = Counter("chatbot_errors", "Questions that ended with an error.", ["kind"], registry=self.registry)
        self.running = Gauge("chatbot_running", "Answers being generated.", ["model"], registry=self.registry)
        self.waiting = Gauge("chatbot_waiting", "Answers waiting for a place.", ["model"], registry=self.registry)
        self.ready = Gauge("chatbot_ready", "1 if a question asked now gets an answer.", registry=self.registry)
        self.info = Gauge("chatbot_run_info", "The served run.", ["run", "checkpoint_sha256"], registry=self.registry)

    def text(self) -> bytes:
        """The figures in Prometheus' text form."""
        return generate_latest(self.registry)
