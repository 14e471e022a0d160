"""The tables of measured figures in README.md and docs/, made from benchmarks/results/.

    python benchmarks/table.py            # print them
    python benchmarks/table.py --write    # put them between the files' markers
    python benchmarks/table.py --check    # exit with 1 if the files say something else
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks/results"
NAMES = {"1b": "1.2B Llama", "3b": "3.5B Llama", "7b": "Llama 2 7B", "13b": "Llama 2 13B", "70b": "Llama 2 70B"}
METHODS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
END = "<!-- end -->"
NOT_YET = "Not measured yet."
"""In place of a table without results."""


def results(name: str) -> list[dict[str, Any]]:
    """A file of results, in the order in which they were taken; none if there is no such file."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cases(machine: str) -> list[dict[str, Any]]:
    """Results of training speed on one kind of machine."""
    return [d for d in results(machine) if "tokens_per_second" in d]


def describe(case: dict[str, Any]) -> str:
    """Method, type, engine and whatever differs from the defaults."""
    words = [METHODS[case["method"]]]
    words.append("bf16" if case["float8"] == "none" else f"FP8 ({case['float8']})")
    if case["engine"] == "deepspeed":
        words.append("DeepSpeed ZeRO-3")
    kept = {"2": "weights kept gathered", "1": "weights and gradients kept whole"}.get(settings(case).get("engine.zero_stage", ""))
    words += [kept] if kept else []
    words += ["rows without context"] if case["rows"] == "qa" else []
    words += [f"{case['accumulate']} x {case['micro']:,} tokens a step"] if case["accumulate"] > 1 else []
    return ", ".join(words)


def on_gpus() -> Iterator[tuple[str, dict[str, Any]]]:
    """Results of training speed on GPUs, with the machine's name. `before` in a result: it was taken before this change, which it lacks."""
    for machine in sorted(path.stem for path in RESULTS.glob("*xH*.jsonl")):
        for result in cases(machine):
            yield machine.replace("x", " x "), result


def settings(case: dict[str, Any]) -> dict[str, str]:
    """What a case set by `--set`."""
    return dict(one.split("=", 1) for one in case["set"])


SPEED = ("| GPUs | model and method | tokens/s a GPU | MFU (of the bf16 peak) | first step after |", "|---|---|---|---|---|")


def speed_of(machine: str, result: dict[str, Any], what: str) -> str:
    """A row of a table of training speed."""
    return (f"| {machine} | {NAMES[result['case']['model']]}, {what} | {result['tokens_per_second_per_worker']:,.0f} | "
            f"{result['mfu']:.1%} | {result['first_step_seconds_after_start']:.0f} s |")


def fastest() -> Iterator[str]:
    """Rows of the short table of training speed: the fastest result of each machine, model, method and precision."""
    yield from SPEED
    best: dict[tuple[str, ...], dict[str, Any]] = {}
    for machine, result in on_gpus():
        case = result["case"]
        key = (machine, case["model"], case["method"], "" if case["float8"] == "none" else "FP8")
        best[key] = max(best.get(key, result), result, key=lambda d: d["tokens_per_second_per_worker"])
    models = list(NAMES)
    for key in sorted(best, key=lambda k: (models.index(k[1]), k[2:], k[0])):
        machine, _, method, precision = key
        yield speed_of(machine, best[key], f"{METHODS[method]}, {precision or 'bf16'}")


def speed() -> Iterator[str]:
    """Rows of the whole table of training speed: the newest result of each case."""
    yield from SPEED
    newest: dict[tuple[str, str, str], str] = {}
    for machine, result in on_gpus():
        beside = ", beside runs on the host's other GPUs" if result.get("beside") else ""
        older = f", before {result['before']}" if "before" in result else ""
        key = (machine, result["case"]["model"], describe(result["case"]) + beside + older)
        newest[key] = speed_of(machine, result, key[2])
    yield from newest.values()


def scaling() -> Iterator[str]:
    """Rows of the table of more GPUs: of the same case the fastest on one GPU, the newest on two and four of one kind. LoRA only: a full
    fine-tune keeps fewer activations on one GPU than on two."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for machine, result in on_gpus():
        if result["case"]["method"] == "full":
            continue
        gpus, kind = machine.split(" x ")
        key = (kind, result["case"]["model"], describe(result["case"]))
        speeds, count = found.setdefault(key, {}), int(gpus)
        speeds[count] = max(result["tokens_per_second_per_worker"], speeds.get(1, 0.0) if count == 1 else 0.0)
    yield ""
    yield "| tokens/s a GPU, of one GPU's fastest | one | two | four |"
    yield "|---|---|---|---|"
    for (kind, model, what), speeds in found.items():
        if 1 in speeds and len(speeds) > 1:
            shares = (f"{speeds[n] / speeds[1]:.1%}" if n in speeds else "–" for n in (2, 4))
            yield f"| {kind}, {NAMES[model]}, {what} | {speeds[1]:,.0f} | {' | '.join(shares)} |"


def saves() -> Iterator[str]:
    """Rows of the table of checkpoints written beside the training: results with saves between steps."""
    yield ""
    yield "| a save beside the training | GB a GPU, written in | loop held | slowest step, beyond the usual | lost in all, of the time |"
    yield "|---|---|---|---|---|"
    for machine, d in on_gpus():
        every = settings(d["case"]).get("checkpoint.every_steps")
        written = re.search(r"([\d.]+) GB of this rank in ([\d.]+) s", " ".join(d.get("checkpoint", {}).get("saved", ())))
        if every and written:
            cost, steps = d["checkpoint"], d["steps"] - d["case"]["warm"]
            whole = steps * sum(d["seconds"].values()) + cost["lost_seconds"]
            lost = cost["lost_seconds"] + steps * d["seconds"]["data"]
            yield (f"| {machine}, {NAMES[d['case']['model']]}, {describe(d['case'])}, every {every} steps | "
                   f"{float(written[1]):.0f}, {float(written[2]):.0f} s | {cost['held_seconds']:.1f} s | "
                   f"{cost['slowest_step_beyond_usual']:.1f} s | {lost:.1f} s, {lost / whole:.1%} |")


def beside_the_steps() -> Iterator[str]:
    """Rows of the table of what evaluations, saves, data and logging took: results with evaluations."""
    yield ""
    yield "| run with evaluations and saves | in steps of | not spent on forward, backward and optimizer |"
    yield "|---|---|---|"
    for machine, d in on_gpus():
        chosen = settings(d["case"])
        if "train.eval_every" in chosen:
            step = sum(value for name, value in d["seconds"].items() if name != "checkpoint")
            yield (f"| {machine}, {NAMES[d['case']['model']]}, {describe(d['case'])}: {chosen['train.eval_rows']} rows evaluated every "
                   f"{chosen['train.eval_every']} steps, saved every {chosen['checkpoint.every_steps']} | {step:.1f} s | "
                   f"{d['lost_share']:.1%} |")


def float8() -> Iterator[str]:
    """Rows of the table of FP8's loss (benchmarks/float8.py)."""
    yield ""
    yield "| FP8 beside bf16: the same rows, mean loss of the last 50 steps | bf16 (each seed) | FP8 | FP8 differs by | seeds differ by |"
    yield "|---|---|---|---|---|"
    for d in results("float8"):
        for kind, found in d["float8"].items():
            case = d["case"]
            yield (f"| {NAMES[case['model']]} from random weights, {case['steps']} steps, {kind}; first loss {d['first_loss']:.2f} | "
                   f"{', '.join(f'{v:.3f}' for v in d['bf16']['last_50_mean'])} | {found['last_50_mean']:.3f} | "
                   f"{abs(found['difference']):.4f} | {d['bf16']['noise']:.4f} |")


def peers() -> Iterator[str]:
    """Rows of the table of others' loops: the product's fastest run of the same model on the same rows and GPUs beside each."""
    yield ""
    yield "| full fine-tune, bf16: others' loops | tokens/s a GPU | this project's fastest |"
    yield "|---|---|---|"
    names = {"old": "DeepSpeed ZeRO-3, rows padded to 512, loss on all", "trl": "TRL's SFTTrainer, packed, Liger"}
    kept = {"bfloat16": "weights and optimizer in bf16", "float32": "weights and optimizer in fp32, as this project keeps them"}
    for peer in results("peers"):
        case, speed = peer["case"], peer["tokens_per_second_per_worker"]
        machine = f"{case['gpus']}x{'H200' if 'H200' in peer['device'] else 'H100'}"
        ours = max((d["tokens_per_second_per_worker"] for d in cases(machine) if d["case"]["float8"] == "none" and
                    (d["case"]["model"], d["case"]["rows"], d["case"]["method"]) == (case["model"], case["rows"], "full")), default=0.0)
        words = [machine.replace("x", " x "), NAMES[case["model"]], names[case["peer"]],
                 *([kept[case["weights"]]] if case["peer"] == "trl" else []),
                 "rows with context" if case["rows"] == "qca" else "rows without context"]
        times = f"{ours:,.0f}: {ours / speed:.2f} times" if ours else "not measured on these rows"
        yield f"| {', '.join(words)} | {speed:,.0f} | {times} |"


def lifecycles() -> Iterator[str]:
    """Rows of the table of runs that were killed, resumed, exported and loaded."""
    yield ""
    yield "| one run on one GPU | killed after step | went on after step | loss | exported and loaded |"
    yield "|---|---|---|---|---|"
    newest = {(d["case"]["model"], d["case"]["method"]): d for d in results("lifecycle")}
    for (model, method), d in newest.items():
        layers = f" ({d['case']['layers']} layers)" if d["case"].get("layers") else ""
        name = f"{d['device'].removeprefix('NVIDIA ')}, {NAMES[model]}{layers}, {METHODS[method]}"
        yield (f"| {name} | {d['killed_after_step']} of {d['case']['steps']} | {d['checkpoint_then']} | "
               f"{d['loss'][0]:.2f} to {d['loss'][1]:.2f} | {'yes' if d['holds'] else 'time was up'} |")


def adapters() -> Iterator[str]:
    """Rows of the table of LoRA beside rounded weights (benchmarks/adapters.py): the newest result of each model."""
    yield ""
    yield "| LoRA on a real model, held-out loss by seed | frozen weights in full | in FP8 | FP8 differs by at most | seeds differ by |"
    yield "|---|---|---|---|---|"
    for model, d in {d["case"]["model"]: d for d in results("adapters")}.items():
        full, rounded = (", ".join(f"{loss:.4f}" for loss in d["held_out"][kind]) for kind in ("none", "tensorwise"))
        yield (f"| {model}, {d['case']['steps']} steps of {d['case']['tokens']:,} tokens | {full} | {rounded} | "
               f"{d['apart']['tensorwise']:.4f} | {d['seeds_apart']:.4f} |")


def exports() -> Iterator[str]:
    """Rows of the table of exports (benchmarks/export.py): the newest result of each model and method."""
    yield ""
    yield "| export in bfloat16, its sha256 and all | cores | one tensor at a time, GB/s | four | ratio |"
    yield "|---|---|---|---|---|"
    for (model, method), d in {(d["case"]["model"], d["case"]["method"]): d for d in results("export")}.items():
        one_, four = d["gb_per_second"]["1"], d["gb_per_second"]["4"]
        what = "adapters merged" if method == "lora" else "all weights trained"
        yield f"| {NAMES[model]}, {what} | {d['cores']} | {one_:.2f} | {four:.2f} | {four / one_:.2f} |"


def starts() -> Iterator[str]:
    """Rows of the table of `make up`."""
    yield ""
    yield "| `make up` on two cores | time | peak memory | disk |"
    yield "|---|---|---|---|"
    names = {"cold": "first time, empty caches", "warm": "after `make down`, caches kept", "unchanged": "again, nothing changed"}
    newest = {d["start"]: d for d in results("up") if d["exit"] == 0}
    for kind, name in names.items():
        if kind in newest:
            d = newest[kind]
            yield f"| {name} | {d['seconds'] // 60:.0f}:{d['seconds'] % 60:02.0f} | {d['peak_memory_gib']} GiB | {d['disk_gib']} GiB |"


def tries(kind: str) -> dict[str, list[dict[str, Any]]]:
    """Tries of `FAULTS_OUT=benchmarks/results/faults.jsonl make chaos` that have a figure of this kind, by fault."""
    found: dict[str, list[dict[str, Any]]] = {}
    for one in results("faults"):
        if kind in one:
            found.setdefault(one["fault"], []).append(one)
    return found


def seconds(found: list[dict[str, Any]], key: str) -> str:
    """Median and worst."""
    values = [f[key] for f in found]
    return f"{statistics.median(values):.0f} s, {max(values):.0f} s"


def faults() -> Iterator[str]:
    """Rows of the tables of faults on the local cluster."""
    yield "| fault of a run | tries | same losses as undisturbed | steps done again (most) | no new step for (median, worst) |"
    yield "|---|---|---|---|---|"
    for fault, found in tries("loss_equal").items():
        yield (f"| {fault} | {len(found)} | {sum(f['loss_equal'] for f in found)} | {max(f['repeated_steps'] for f in found)} | "
               f"{seconds(found, 'recovery_seconds')} |")
    if ended := tries("text"):
        yield ""
        yield "| fault that ends a run | tries | refused with the reason after (median, worst) |"
        yield "|---|---|---|"
        for fault, found in ended.items():
            yield f"| {fault} | {len(found)} | {seconds(found, 'recovery_seconds')} |"
    if asked := tries("wrong_answers"):
        yield ""
        yield "| fault of the chatbot | tries | wrong answers | no answer for (median, worst) | back after its end (median, worst) |"
        yield "|---|---|---|---|---|"
        for fault, found in asked.items():
            yield (f"| {fault.removeprefix('chatbot: ')} | {len(found)} | {sum(f['wrong_answers'] for f in found)} | "
                   f"{seconds(found, 'away_seconds')} | {seconds(found, 'recovery_seconds')} |")


def one(machine: str, newest: bool = False, **case: Any) -> dict[str, Any]:
    """The oldest (or newest) result whose case has these values."""
    found = [d for d in cases(machine) if all(d["case"].get(k) == v for k, v in case.items())]
    return found[-1 if newest else 0]


def engines() -> Iterator[str]:
    """Rows of the table behind the decisions on engines: what was measured before and after, or with and without."""
    bf16 = {"method": "full", "float8": "none", "engine": "fsdp"}
    kept = {"workers": 2, "set": ["engine.zero_stage=2"]}
    wide = {"model": "7b", "float8": "tensorwise", "accumulate": 4}
    adapters = {"model": "7b", "method": "lora", "accumulate": 2}
    dropped = one("2xH200", model="7b", set=["checkpoint.every_steps=8"], **bf16)
    pairs = [
        ("AdamW in one kernel: optimizer, ms", "3.5B, 1 x H100", "optimizer", one("1xH100", model="3b", accumulate=1),
         one("1xH100", model="3b", accumulate=2)),
        ("AdamW in one kernel: optimizer, ms", "7B, 1 x H200", "optimizer", one("1xH200", model="7b", accumulate=1, **bf16),
         one("1xH200", model="7b", accumulate=4, float8="tensorwise")),
        ("micro-batches of 8,192 without recomputation: MFU", "3.5B, 1 x H100", "mfu", one("1xH100", model="3b", accumulate=2),
         one("1xH100", model="3b", accumulate=4)),
        ("gathered weights kept: tokens/s a GPU", "7B, 2 x H200", "speed", dropped, one("2xH200", model="7b", **bf16, **kept)),
        ("FP8 tensorwise, gathered weights kept: tokens/s a GPU", "7B, 2 x H200", "speed", one("2xH200", model="7b", **bf16, **kept),
         one("2xH200", model="7b", float8="tensorwise", **kept)),
        ("FP8 tensorwise, norms' gradients in kernels of their own, gradients reduced once a step: tokens/s a GPU", "7B, 2 x H200", "speed",
         one("2xH200", **wide, **kept), one("2xH200", newest=True, **wide)),
        ("LoRA, A's output scaled instead of B's: tokens/s", "7B, 1 x H100", "speed", one("1xH100", **adapters),
         one("1xH100", newest=True, **adapters)),
        ("LoRA, frozen weights in FP8: tokens/s", "7B, 1 x H200", "speed", one("1xH200", newest=True, float8="none", **adapters),
         one("1xH200", float8="tensorwise", **adapters)),
        ("FP8 rowwise: tokens/s a GPU", "7B, 2 x H200", "speed", dropped, one("2xH200", model="7b", float8="rowwise")),
    ]
    yield "| change: figure | model, GPUs | without | with |"
    yield "|---|---|---|---|"
    shown = {"optimizer": lambda d: f"{1e3 * d['seconds']['optimizer']:.0f}", "mfu": lambda d: f"{d['mfu']:.1%}",
             "speed": lambda d: f"{d['tokens_per_second_per_worker']:,.0f}"}
    for name, where, figure, without, with_it in pairs:
        yield f"| {name} | {where} | {shown[figure](without)} | {shown[figure](with_it)} |"


def preparation() -> Iterator[str]:
    """Rows of the table of preparation: the newest result of each number of rows."""
    if not results("prepare"):
        return
    yield ""
    yield "| preparation, two processes on two cores | rows/s | CPU seconds | private memory, most |"
    yield "|---|---|---|---|"
    newest = {(d["rows"], d["short"]): d for d in results("prepare")}
    for (rows, short), d in sorted(newest.items()):
        for side, name in (("ours", "this project"), ("map", "`datasets.map`, no checks, no duplicates removed")):
            if side in d:
                yield (f"| {rows:,} rows {'without' if short else 'with'} context: {name} | {d[side]['rows_per_second']:,} | "
                       f"{d[side]['cpu_seconds']:,.0f} | {d[side]['peak_private_mib']:,.0f} MiB |")


def kills() -> Iterator[str]:
    """Rows of the table of workers killed at random steps (benchmarks/kills.py)."""
    if not results("kills"):
        yield NOT_YET
        return
    yield "| run | kills | same losses as undisturbed | steps done again (most) | seconds to the next step (median, most) |"
    yield "|---|---|---|---|---|"
    for d in results("kills"):
        if d["kills"]:
            case = d["case"]
            where = f"{case['gpus']} GPUs" if case["gpus"] else "two workers on the CPU"
            yield (f"| {where}, a checkpoint every {case['every']} steps | {len(d['kills'])} | "
                   f"{'all' if d.get('same_losses') else 'no' if 'same_losses' in d else 'same rows'} | {d['repeated_most']} | "
                   f"{d['seconds_median']:.0f}, {d['seconds_most']:.0f} |")
        if elastic := d.get("elastic"):
            rows = "same rows" if d.get("same_rows") else "no"
            yield (f"| the same, a node lost and back | – | {rows} | {elastic['steps_done_again']} | "
                   f"{elastic['seconds_to_fewer']:.0f} with fewer, {elastic['seconds_to_all_again']:.0f} with all again |")


def unequal() -> Iterator[str]:
    """Rows of the table of unequal workers: the newest result of each share or slowdown and size of a step."""
    if not results("unequal"):
        yield NOT_YET
        return
    yield "| workers | equal tokens, of the sum | tokens by speed, of the sum | largest difference of a step's loss to equal tokens |"
    yield "|---|---|---|---|"
    newest = {(d["case"]["gpus"], d["case"].get("nodes", 1),
               round(d["share"], 2) if "share" in d else round(d.get("slowdown_measured", 0), 1),
               d["case"]["tokens"] * d["case"].get("accumulate", 1)): d for d in results("unequal")}
    for (gpus, nodes, value, step), d in newest.items():
        if "balanced_of_sum" in d:
            slow = f"{nodes} shard groups, the last" if nodes > 1 else "one"
            where = (f"{gpus} GPUs, {slow} slowed {d['slowdown_measured']:.2f} times" if gpus else
                     f"two on the CPU, one held to {value:.0%} of its core")
            equal, difference = (f"{d['equal_of_sum']:.1%}", f"{d['loss_difference']['balanced_to_equal']:.1e}") \
                if "equal_of_sum" in d else ("time was up" if "equal" in d["runs"] else "not run", "–")
            yield f"| {where}, steps of {step:,} tokens | {equal} | {d['balanced_of_sum']:.1%} | {difference} |"


def network() -> Iterator[str]:
    """Rows of the table of sharding behind limited links: the newest result of each bandwidth."""
    if not results("network"):
        yield NOT_YET
        return
    yield "| links as | sharding | seconds a step | speed, of that without a limit | GB sent by a node a step | by plan |"
    yield "|---|---|---|---|---|---|"
    for gbps, d in sorted({d["gbps"]: d for d in results("network")}.items()):
        for kind, found in d["slow"].items():
            yield (f"| {gbps:g} Gbit/s | {kind} | {found['step_seconds']:.2f} | {found['of_free']:.0%} | {found['sent_bytes'] / 1e9:.2f} | "
                   f"{found['predicted_bytes'] / 1e9:.2f} |")


def nodes() -> Iterator[str]:
    """Rows of the table of faults of a second node (`NODES_OUT=benchmarks/results/nodes.jsonl make e2e-nodes`)."""
    yield "| what happens | measured |"
    yield "|---|---|"
    for what, one_ in {d["what"]: d for d in results("nodes")}.items():
        figures = (f"{name.replace('_', ' ')} {value:.0f} s" for name, value in one_.items() if name != "what")
        yield f"| {what} | {', '.join(figures)} |"


def answers() -> Iterator[str]:
    """Rows of the table of the chatbot's engine (benchmarks/chatbot_speed.py): the newest result of each model and device."""
    yield "| model, device | answers at once | tokens/s | plain `generate`, one after another | ratio | first token after | `generate`'s |"
    yield "|---|---|---|---|---|---|---|"
    for (model, device), d in {(d["model"], d["device"]): d for d in results("chatbot")}.items():
        where = device.removeprefix("NVIDIA ") if d["threads"] is None else f"{d['threads']} threads of the CPU"
        for streams, found in d["streams"].items():
            ours, plain = found["engine"], found["generate"]
            yield (f"| {NAMES.get(model, model)}, {d['dtype']}, {where} | {streams} | {ours['tokens_per_second']:,.0f} | "
                   f"{plain['tokens_per_second']:,.0f} | {found['ratio']:.2f} | {ours['first_token_seconds']:.2f} s | "
                   f"{plain['first_token_seconds']:.2f} s |")


TABLES: dict[str, dict[str, Callable[[], Iterator[str]]]] = {
    "README.md": {"": lambda: chain(fastest(), peers(), scaling(), starts())},
    "docs/speed.md": {"": speed, "beside": lambda: chain(saves(), beside_the_steps()), "float8": lambda: chain(float8(), adapters()),
                      "lifecycles": lambda: chain(lifecycles(), exports()), "preparation": preparation},
    "docs/reliability.md": {"": faults, "kills": kills, "nodes": nodes},
    "docs/mixed-gpus.md": {"unequal": unequal},
    "docs/network.md": {"network": network},
    "docs/chatbot.md": {"": answers},
    "docs/decisions/engines.md": {"": engines},
}
"""File, and the lines between each of its markers: `<!-- benchmarks/table.py -->`, or with a name."""


def written(file: str) -> str:
    """A file with its tables as they should be."""
    text = (REPOSITORY / file).read_text()
    for name, table in TABLES[file].items():
        begin = f"<!-- benchmarks/table.py{f': {name}' if name else ''} -->"
        if begin not in text:
            raise ValueError(f"{file} has no place for the table {name!r}: {begin}")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(END)
        text = "\n".join([before + begin, *table(), END + after])
    return text


def main() -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    old = [name for name in TABLES if (REPOSITORY / name).read_text() != written(name)]
    if options.check:
        sys.exit("".join(f"{name} does not show benchmarks/results/: run `python benchmarks/table.py --write`.\n" for name in old) or 0)
    for file, tables in TABLES.items():
        if options.write:
            (REPOSITORY / file).write_text(written(file))
        else:
            print(f"{file}\n", *(line for table in tables.values() for line in (*table(), "")), sep="\n")


if __name__ == "__main__":
    main()
