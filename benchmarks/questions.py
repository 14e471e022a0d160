"""Research questions with an abstract each, that the chatbot's benchmarks ask."""

from __future__ import annotations

TOPICS = ["vitamin D", "aspirin", "early mobilisation", "statins", "probiotics", "telemedicine", "exercise", "metformin"]
ABSTRACT = ("We studied the effect of {topic} in a randomised trial of 412 adults over twelve months. The primary outcome was the number "
            "of hospital admissions; secondary outcomes were quality of life, adverse events and costs. Participants were assigned to the "
            "intervention or to usual care, and assessors were blinded. Admissions were lower in the intervention group (relative risk "
            "0.81, 95% confidence interval 0.68 to 0.97), quality of life did not differ, and adverse events were rare in both groups. ")


def prompts(count: int) -> list[str]:
    """`count` different prompts."""
    return [f"### Context:\n{ABSTRACT.format(topic=TOPICS[i % len(TOPICS)])}\n\n### Question:\nDoes {TOPICS[i % len(TOPICS)]} reduce "
            f"admissions ({i})?\n\n### Answer:\n" for i in range(count)]
