"""Workers killed with SIGKILL at random steps: the run ends as if nothing had happened. Two processes, gloo, a tiny engine."""

import random
from pathlib import Path

import numpy as np
import pytest

from tests.trainer import tiny
from tests.trainer.workers import Workers
from trainer.checkpoint import store
from trainer.paths import RunPaths

EVERY = 3
"""Steps between checkpoints in these runs."""


def settings(storage, **parts):
    return tiny.config(Path(storage), checkpoint={"every_steps": EVERY}, **parts)


def case(rank, world, storage, dies=None):
    """In a rank's process: train to the end, or to the step at which this rank dies."""
    return tiny.run(settings(storage), rank=rank, world=world, die_at=dies[1] if dies is not None and dies[0] == rank else 0,
                    short_saves=True)


def attempt(workers, storage, world, dies=None):
    """One worker group; `dies`: (rank, step). Returns rank 0's result, or None if a worker was lost."""
    results = workers.run(world, "tests.trainer.test_resume:case", {"storage": str(storage), "dies": dies})
    return results and results[0]


@pytest.fixture(scope="module")
def workers():
    with Workers() as w:
        yield w


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, workers):
    results = {}

    def of(world):
        if world not in results:
            storage = tmp_path_factory.mktemp(f"whole-{world}")
            tiny.write_rows(RunPaths.of(settings(storage)).dataset)
            results[world] = attempt(workers, storage, world)
        return results[world]
    return of


def disturbed(workers, storage, world, seed, most=3):
    """Kill a random worker at a random step, up to `most` times, then let the run end. Returns the result and the steps lost."""
    generator = random.Random(seed)
    paths = RunPaths.of(settings(storage))
    tiny.write_rows(paths.dataset)
    lost = []
    for _ in range(generator.randint(1, most)):
        newest = store.newest(paths.checkpoints)
        begin = newest.step if newest else 0
        step = generator.randint(begin + 1, 16)
        assert attempt(workers, storage, world, (generator.randrange(world), step)) is None
        newest = store.newest(paths.checkpoints)
        lost.append(step - 1 - (newest.step if newest else 0))
    return attempt(workers, storage, world), lost


def check(result, truth, lost):
    assert result["curve"] == truth["curve"]
    assert result["state"]["metrics"] == truth["state"]["metrics"] and result["step"] == truth["step"]
    for name, weight in truth["weights"].items():
        assert np.array_equal(weight, result["weights"][name]), name
    assert all(0 <= steps <= EVERY for steps in lost), lost


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_worker_ends_with_the_same_loss(tmp_path, workers, undisturbed, seed):
    result, lost = disturbed(workers, tmp_path, 2, seed)
    check(result, undisturbed(2), lost)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 30))
def test_killed_worker_20_times(tmp_path, workers, undisturbed, seed):
    result, lost = disturbed(workers, tmp_path, 2, seed)
    check(result, undisturbed(2), lost)


def test_another_world_size_goes_on_with_the_same_rows(tmp_path, workers, undisturbed):
    """One worker continues what two began: the same step, no row twice, a loss as close as the order of sums allows."""
    tiny.write_rows(RunPaths.of(settings(tmp_path)).dataset)
    assert attempt(workers, tmp_path, 2, (1, 9)) is None
    began = store.newest(RunPaths.of(settings(tmp_path)).checkpoints).step
    result = attempt(workers, tmp_path, 1)
    truth = undisturbed(2)
    assert result["resumed"] == began >= 3
    assert result["state"]["rows"] == truth["state"]["rows"] == 240 and result["state"]["tokens"] == truth["state"]["tokens"]
    assert result["state"]["metrics"]["eval_loss"] == pytest.approx(truth["state"]["metrics"]["eval_loss"], rel=0.05)
