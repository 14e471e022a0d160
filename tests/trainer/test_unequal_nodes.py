"""A whole run over Ray nodes of unequal size, as worker groups of unequal pods give them: two workers on one node, one on another, none on
the head. Minutes: `make test-slow`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.test_whole_runs import ended, prepared, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without CPUs, and nodes of two and of one, each with a raylet of its own."""
    from ray.cluster_utils import Cluster

    made = Cluster()
    for cpus in (0, 2, 1):
        made.add_node(num_cpus=cpus, object_store_memory=100 << 20)
    yield made
    made.shutdown()


def test_workers_are_dealt_over_nodes_of_unequal_size(cluster: Any, tmp_path: Path) -> None:
    """Three workers of one CPU each have no other place than two on the one node and one on the other."""
    path = prepared(tmp_path, epochs=2)
    document = json.loads(path.read_text())
    document["resources"] |= {"workers": 3}
    path.write_text(json.dumps(document))
    ended(start(path, "faults-unequal", RAY_ADDRESS=cluster.address))
    report = json.loads((tmp_path / "runs/faults-unequal/report.json").read_text())
    assert len(report["workers"]["ranks"]) == 3 and all(rank["tokens"] > 0 for rank in report["workers"]["ranks"])
    assert report["tuned"]["loss"] < report["base"]["loss"]
