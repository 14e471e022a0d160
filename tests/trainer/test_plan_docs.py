"""The tables of docs/network.md and docs/models.md are what benchmarks/network_model.py makes today."""

from __future__ import annotations

import contextlib
import io
import re

import pytest

from benchmarks import network_model


@pytest.mark.parametrize("document", network_model.TABLES)
def test_tables(document: str) -> None:
    text = (network_model.DOCS / document).read_text(encoding="utf-8")
    assert network_model.filled(document, text) == text, "python -m benchmarks.network_model --write"
    assert set(re.findall(r"<!-- table: (\S+) -->", text)) == set(network_model.TABLES[document])


def test_the_documents_claims() -> None:
    """Sentences of docs/network.md that state a number."""
    rows = {line.split(" | ")[0].strip("| "): [c.strip(" |") for c in line.split(" | ")[1:]]
            for line in network_model.bytes_a_step().splitlines()[2:]}
    four = {k: float(v[1].replace(",", "")) for k, v in rows.items()}
    assert four["FSDP, hybrid, bf16 reduction"] / four["FSDP, flat, stage 3"] == pytest.approx(0.1, abs=0.005)
    mixed = network_model.plan(network_model.make("Llama-2-7b", {**network_model.MIXED, "network_gbps": 100}, 262144), advise=False)
    assert mixed.groups[1].load.tokens / mixed.groups[0].load.tokens == pytest.approx(2.6, abs=0.15)


@pytest.mark.parametrize("name", sorted(path.name for path in network_model.EXAMPLES.iterdir()))
def test_the_examples_plans_are_the_commands_output(name: str) -> None:
    """docs/examples.md shows what `python -m trainer plan` prints for the file that is deployed."""
    from trainer.__main__ import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["plan", "--config", str(network_model.EXAMPLES / name / "finetune.yaml")]) == 0
    assert f"```\n{printed.getvalue()}```" in (network_model.DOCS / "examples.md").read_text(encoding="utf-8")


def test_missing_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place for the table"):
        network_model.filled("models.md", "nothing")
