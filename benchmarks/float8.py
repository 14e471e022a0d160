"""Does FP8 train as bf16 does? The loss curves of both over the same rows, and what the seed alone changes.

    python benchmarks/float8.py --model 1b --steps 300 --out results.jsonl

Every run goes through `train.py` on text of a random Markov chain (`--text chain`: learnable, no row seen twice) from random weights, which
is harder on FP8 than a fine-tune: losses and gradients change by more. `--seeds` bf16 runs show the noise: the spread of the mean loss of
the last 50 steps between seeds. FP8 is within noise if its mean of those steps differs from its bf16 twin's (same seed, same rows in the
same order) by no more than that spread. Exits with 1 if it does not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from record import record
from train import command_line, measure

LAST = 50


def options_of() -> argparse.ArgumentParser:
    """train.py's options and a few more."""
    parser = command_line(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("--seeds", type=int, default=3, help="bf16 runs")
    parser.add_argument("--kinds", nargs="+", choices=("tensorwise", "rowwise"), default=["tensorwise", "rowwise"])
    parser.set_defaults(text="chain", curve=True, steps=300, model="1b", timeout=200.0)
    return parser


def main() -> None:
    """Train, compare, print."""
    options = options_of().parse_args()
    settings = ["train.learning_rate=0.0003", *options.set]  # of one field the last counts

    def run(float8: str, seed: int) -> dict[str, Any]:
        case = argparse.Namespace(**{k: v for k, v in vars(options).items() if k not in ("seeds", "kinds")})
        case.float8, case.set = float8, [*settings, f"seed={seed}"]
        result = measure(case)
        if len(result.get("losses", ())) < options.steps:
            record(result, "")
            sys.exit(f"The run (float8 {float8}, seed {seed}) ended after {len(result.get('losses', ()))} of {options.steps} steps.")
        return result

    def last(result: dict[str, Any]) -> float:
        return statistics.mean(result["losses"][-LAST:])

    bf16 = [run("none", seed) for seed in range(options.seeds)]
    noise = statistics.stdev(last(result) for result in bf16)
    kinds = {}
    for kind in options.kinds:
        result = run(kind, 0)
        apart = [a - b for a, b in zip(result["losses"], bf16[0]["losses"], strict=True)]
        kinds[kind] = {"last_50_mean": round(last(result), 4), "difference": round(last(result) - last(bf16[0]), 4),
                       "largest_difference": round(max(map(abs, apart)), 4), "within_noise": abs(last(result) - last(bf16[0])) <= noise,
                       "tokens_per_second": result["tokens_per_second"], "losses": result["losses"][::10]}
    record({"case": {"model": options.model, "steps": options.steps, "settings": settings}, "first_loss": bf16[0]["losses"][0],
            "bf16": {"last_50_mean": [round(last(result), 4) for result in bf16], "noise": round(noise, 4),
                     "tokens_per_second": bf16[0]["tokens_per_second"], "losses": bf16[0]["losses"][::10]},
            "float8": kinds, "versions": bf16[0]["versions"]}, options.out)
    sys.exit(0 if all(kind["within_noise"] for kind in kinds.values()) else 1)


if __name__ == "__main__":
    main()
