"""The recipes that are shipped: trainer/recipes/*.yaml, each a whole configuration, headed by what plan says of it.

    python -m trainer.plan.recipes            # one line each
    python -m trainer.plan.recipes --write    # renew the headers (a test holds them to plan's output)
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from trainer import config
from trainer.files import write_atomic
from trainer.plan.hardware import GIB
from trainer.plan.planner import Plan, plan
from trainer.plan.text import checkpointing, count, data

DIRECTORY = Path(__file__).resolve().parent.parent / "recipes"
METHODS = {"full": "all weights", "lora": "LoRA", "qlora": "QLoRA"}
END = "# ---"
"""Line that ends the header."""


def names() -> list[str]:
    """The recipes, sorted."""
    return sorted(p.stem for p in DIRECTORY.glob("*.yaml"))


def load(name: str) -> config.Config:
    """A recipe's configuration."""
    return config.load(str(DIRECTORY / f"{name}.yaml"))


def hardware(result: Plan) -> str:
    """For example `12x A100-80GB and 4x H100-80GB on 4 nodes`."""
    cards = " and ".join(f"{g.group.workers}x {g.group.gpu.name if g.group.gpu else '?'}" for g in result.groups)
    return f"{cards} on {result.nodes} nodes, {result.network_gbps:g} Gbit/s" if result.nodes > 1 else cards


def header(result: Plan) -> list[str]:
    """The comment at the head of a recipe: for which hardware, what it needs, what is predicted."""
    several = len(result.groups) > 1
    memory = "; ".join(f"{g.memory.total / GIB:.1f} of {g.group.memory / GIB:.1f} GiB{f' ({g.group.name})' if several else ''}"
                       f", checkpointing {checkpointing(g)}" for g in result.groups)
    texts = [f"{result.model} ({count(result.architecture.parameters)} parameters), {METHODS[result.groups[0].load.method]}, "
             f"for {hardware(result)}.",
             f"Needs of each GPU {memory}; of each host {result.host_bytes / GIB:,.0f} GiB; of the storage {data(result.storage_bytes)}.",
             f"Predicted: {result.tokens_per_second:,.0f} tokens/s ({result.tokens_per_second / result.workers:,.0f} a GPU), "
             f"{result.step_seconds:.2f} s a step, {1e8 / result.tokens_per_second / 3600:.2f} h for 100 million tokens."]
    return [f"# {line}" for text in texts for line in textwrap.wrap(text, 130)] + [END]


def write(name: str) -> None:
    """Renew a recipe's header."""
    path = DIRECTORY / f"{name}.yaml"
    text = path.read_text(encoding="utf-8")
    body = text.split(f"{END}\n", 1)[1] if f"{END}\n" in text else text
    write_atomic(path, "\n".join([*header(plan(load(name))), body]))


if __name__ == "__main__":
    for recipe in names():
        if "--write" in sys.argv[1:]:
            write(recipe)
        found = plan(load(recipe), advise=False)
        print(f"{recipe:28} {hardware(found):60} {'fits' if found.fits else 'DOES NOT FIT':12} {found.tokens_per_second:9,.0f} tokens/s")
