"""A plan as text: what `python -m trainer plan` prints."""

from __future__ import annotations

from trainer.plan.hardware import GIB
from trainer.plan.planner import GroupPlan, Plan

LABELS = {"weights": "weights", "gradients": "gradients", "optimizer": "optimizer (AdamW)", "activations": "activations",
          "logits": "logits and head", "buffers": "gathered layers, buffers", "reserve": "reserve (context, fragments)"}


def count(n: float) -> str:
    """A large number in three digits: 6.74 B, 40.0 M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f}"


def data(n: float) -> str:
    """Bytes in 10^9 or 10^6."""
    return f"{n / 1e9:,.1f} GB" if n >= 1e8 else f"{n / 1e6:,.1f} MB"


def table(rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
            for row in rows]


def checkpointing(group: GroupPlan) -> str:
    """How activations are kept."""
    load = group.load
    return f"selective, budget {load.budget:g}" if load.checkpointing == "selective" and load.compiled else load.checkpointing


def verdict(group: GroupPlan) -> str:
    """Whether a group's GPU has the memory."""
    if group.fits is None:
        return "not known"
    return "fits" if group.fits else f"LACKS {(group.memory.total - group.group.memory) / GIB:.1f} GiB"


def render(plan: Plan) -> str:
    """The whole plan."""
    load = plan.groups[0].load
    engine = {"fsdp": f"FSDP2, stage {load.stage}", "replicated": "weights whole on each worker",
              "deepspeed": f"DeepSpeed ZeRO-{load.stage}"}[load.engine]
    if load.engine != "replicated":
        engine += f", sharded over {load.shards}" + (f", {load.replicas} replicas" if load.replicas > 1 else "")
    if load.offload != "none":
        engine += f", optimizer on {load.offload}"
    lines = [f"Plan of {plan.run}: {plan.model}, {count(plan.architecture.parameters)} parameters, {count(plan.trained)} trained "
             f"({load.method})", f"{engine}; {plan.workers} worker{'s' if plan.workers > 1 else ''} on {plan.nodes} node"
             f"{'s' if plan.nodes > 1 else ''}", "", "Memory of one worker, GiB"]
    named = len(plan.groups) > 1
    head = [f"{g.group.name}: {g.group.gpu.name}" if named and g.group.gpu else g.group.gpu.name if g.group.gpu else g.group.name
            for g in plan.groups]
    rows = [["", *head]]
    rows += [[LABELS[part], *(f"{g.memory.parts()[part] / GIB:.1f}" for g in plan.groups)] for part in LABELS]
    rows += [["needed", *(f"{g.memory.total / GIB:.1f}" for g in plan.groups)],
             ["there is", *(f"{g.group.memory / GIB:.1f}" if g.group.memory else "?" for g in plan.groups)],
             ["", *(verdict(g) for g in plan.groups)],
             ["checkpointing" + (" (chosen)" if plan.automatic else ""), *(checkpointing(g) for g in plan.groups)],
             ["tokens a micro-batch", *(f"{g.load.tokens:,}" for g in plan.groups)],
             ["micro-batches a step", *(str(g.load.micro_batches) for g in plan.groups)]]
    lines += table(rows)
    lines += ["", "Hosts and storage", f"  memory of a host        {plan.host_bytes / GIB:,.1f} GiB beside the processes themselves",
              f"  a checkpoint            {data(plan.checkpoint_bytes)}", f"  kept on the storage     {data(plan.storage_bytes)}"]
    if plan.nodes > 1:
        wire = f", {plan.network_gbps:g} Gbit/s" if plan.network_gbps else ""
        lines += ["", "Network", f"  {data(plan.wire_bytes)} a step through each node's card in one direction{wire}"]
    if plan.step_seconds:
        parts = max((g.step for g in plan.groups if g.step), key=lambda s: s.total)
        lines += ["", "Speed", f"  step                    {plan.step_seconds:.3f} s for {plan.tokens_per_step:,} tokens "
                  f"(compute {parts.compute:.3f}, copies {parts.copies:.3f}, optimizer {parts.optimizer:.3f}, network {parts.network:.3f})",
                  f"  tokens/s                {plan.tokens_per_second:,.0f} ({plan.tokens_per_second / plan.workers:,.0f} a GPU), "
                  f"MFU {plan.mfu:.1%}, scaling {plan.scaling:.0%}",
                  f"  100 million tokens      {1e8 / plan.tokens_per_second / 3600:.2f} h"]
        if plan.epoch_hours:
            lines.append(f"  an epoch                {plan.epoch_hours:.2f} h")
        if plan.run_hours:
            lines.append(f"  the run                 {plan.run_hours:.2f} h")
    if plan.advice:
        lines += ["", "What to change" if plan.fits is False else "What would help", *(f"  - {a}" for a in plan.advice)]
    if plan.notes:
        lines += ["", "Notes", *(f"  - {n}" for n in plan.notes)]
    return "\n".join(lines) + "\n"
