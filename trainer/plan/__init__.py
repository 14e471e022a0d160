"""Memory, network and time of a run, predicted without a GPU."""

from trainer.plan.planner import DatasetFacts, Plan, choose_checkpointing, plan
from trainer.plan.text import render

__all__ = ["DatasetFacts", "Plan", "choose_checkpointing", "plan", "render"]
