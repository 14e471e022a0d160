"""The model card (README.md of the model directory), from what is known about the run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from trainer.config import Config, DataConfig, ModelConfig, to_dict
from trainer.files import read_manifest
from trainer.paths import RunPaths
from trainer.report.metrics import METRICS, number, training_summary

METHODS = {"full": "full fine-tune (all weights)", "lora": "LoRA adapters, merged into the base weights",
           "qlora": "QLoRA adapters (trained beside 4-bit base weights), merged into the unquantised base weights"}


def describe_model(model: ModelConfig) -> str:
    """The base model in a few words."""
    if model.architecture:
        return "a randomly initialised Llama (for tests and benchmarks)"
    name = model.name or model.path.rstrip("/").rsplit("/", 1)[-1]
    return name + (f" at revision {model.revision[:10]}" if model.revision else "") + (f" ({model.gguf_file})" if model.gguf_file else "")


def describe_data(data: DataConfig) -> str:
    """The dataset in a few words."""
    if data.sample:
        return "the sample shipped with the trainer (PubMedQA form)"
    subsets = f" ({', '.join(data.subsets)})" if data.subsets else ""
    return (data.name or data.path) + subsets + (f" at revision {data.revision[:10]}" if data.revision else "")


def _plain(text: str) -> str:
    """One line of text without Markdown or HTML of its own."""
    return re.sub(r"([\\`*_{}\[\]<>#|&])", r"\\\1", " ".join(text.split()))


def _front_matter(config: Config) -> str:
    run = config.run
    fields: dict[str, Any] = {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["llama", "fine-tuned", run.method.kind],
        **({"license": run.model.licence} if run.model.licence else {}), **({"base_model": run.model.name} if run.model.name else {}),
        **({"datasets": [run.data.name]} if run.data.name else {}),
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _dataset_lines(dataset: Path) -> list[str]:
    manifest = read_manifest(dataset) or {}
    splits = manifest.get("splits", {})
    lines = [f"- {name}: {split['rows']:,} rows, {split['tokens']:,} tokens ({split['answer_tokens']:,} of answers)"
             for name, split in splits.items() if isinstance(split, dict) and {"rows", "tokens", "answer_tokens"} <= split.keys()]
    if rejected := {k: v for k, v in manifest.get("rejected", {}).items() if v}:
        lines.append("- not used: " + ", ".join(f"{count:,} {_plain(reason)}" for reason, count in sorted(rejected.items())))
    return lines


def _evaluation_lines(config: Config, report: dict[str, Any] | None) -> list[str]:
    if report is None or not report.get("difference"):
        return ["Base against tuned on the held-out rows: not yet evaluated when this card was written."]
    lines = ["| Metric | Base | Tuned | Difference (95 % interval) | Rows |", "|---|---:|---:|---:|---:|"]
    for metric in METRICS:
        if difference := report["difference"].get(metric.key):
            low, high = number(difference["low"], True), number(difference["high"], True)
            lines.append(f"| {metric.title} | {number(report['base'][metric.key])} | {number(report['tuned'][metric.key])} | "
                         f"{number(difference['mean'], True)} ({low} to {high}) | {difference['rows']} |")
    return lines


def model_card(config: Config, paths: RunPaths, report: dict[str, Any] | None) -> str:
    """The card as Markdown. `report`: the document of report.json once there is one."""
    run = config.run
    summary = training_summary(paths)
    base = describe_model(run.model)
    trained = [f"- method: {METHODS[run.method.kind]}"]
    if run.method.kind != "full":
        trained.append(f"- adapters: rank {run.method.rank}, alpha {run.method.alpha:g}, on {', '.join(run.method.targets)}")
    trained += [f"- optimizer: AdamW, peak learning rate {run.train.learning_rate:g}, {run.train.schedule} schedule, "
                f"{run.train.tokens_per_step:,} tokens a step, loss on {'the answers' if run.data.loss_on == 'answer' else 'all tokens'}",
                f"- seed: {run.seed}"]
    if summary["steps"]:
        trained.append(f"- done: {summary['steps']:,} steps, {summary['epoch']:.2f} epochs, {summary['tokens']:,} tokens in "
                       f"{summary['seconds']:,.0f} s; last training loss {number(summary['final_loss'])}"
                       + (f", held-out loss {number(summary['eval_loss'])}" if summary["eval_loss"] is not None else ""))
    licence = (f"The base model's licence ({run.model.licence}) applies to this model as well." if run.model.licence
               else "The base model's licence applies to this model as well; the run's configuration does not name it.")
    return "\n".join([
        _front_matter(config),
        f"# {config.run_id}", "",
        f"{_plain(base)}, fine-tuned on {_plain(describe_data(run.data))}.", "",
        "## Use", "",
        "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("<this directory>")',
        'tokenizer = AutoTokenizer.from_pretrained("<this directory>")', "```", "",
        f"Ask it in the form that it was trained on (`{run.data.format}`): prompt.json has the template and the tokens that end an answer.",
        "", "## Data", "",
        f"{_plain(describe_data(run.data))}; {run.data.test_share:.0%} of the rows held out by a hash of their ids.", "",
        *_dataset_lines(paths.dataset), "",
        "## Training", "", *trained, "",
        "## Evaluation", "", *_evaluation_lines(config, report), "",
        "## Limits", "",
        "- Not for medical advice: answers can be wrong, incomplete or out of date, and sound certain all the same. Nobody has reviewed "
        "them for clinical use.",
        "- It answers from what it was trained on and from the context in the prompt; it does not look anything up and cites nothing.",
        f"- Rows were cut to {run.data.max_tokens:,} tokens; longer contexts were not seen in training.",
        "- The figures above hold for rows like the held-out ones. Other topics, languages and forms of question were not measured.",
        "- Biases of the base model and of the dataset remain.", "",
        "## Licence", "", _plain(licence), "",
        "## Reproduction", "",
        "The run's resolved configuration, from which the same model is made again (`python -m trainer run --config run.yaml`):", "",
        *["    " + line for line in _run_yaml(config).splitlines()], "",
    ])


def _run_yaml(config: Config) -> str:
    return yaml.safe_dump({"run": to_dict(config.run)}, sort_keys=False, allow_unicode=True, width=100)
