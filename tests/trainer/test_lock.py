"""The run's lock: one holder, named to others; a holder that is gone is replaced."""

import json
import subprocess
import sys
import threading
import time

import pytest

from trainer.lock import Held, Lock

LEASE = 0.8


def foreign(path):
    """Make the lock look like that of another host, whose processes cannot be looked at."""
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "host": "elsewhere", "boot": "other"}))


def test_second_is_refused_with_the_holders_name(tmp_path):
    path = tmp_path / "run-1" / "lock.json"
    with Lock(path, "ada on host-1", LEASE):
        with pytest.raises(Held, match="run-1 is being worked on by ada on host-1"), Lock(path, "bob", LEASE):
            pass
    with Lock(path, "bob", LEASE):
        assert json.loads(path.read_text())["holder"] == "bob"
    assert not path.exists()


def test_stale_lease_is_taken_over(tmp_path):
    path = tmp_path / "lock.json"
    first = Lock(path, "gone", LEASE)
    assert first._create()
    foreign(path)
    began = time.monotonic()
    with Lock(path, "next", LEASE):
        assert LEASE <= time.monotonic() - began < 4 * LEASE
        assert json.loads(path.read_text())["holder"] == "next"
    assert list(tmp_path.iterdir()) == []


def test_dead_process_of_this_host_is_replaced_at_once(tmp_path):
    path = tmp_path / "lock.json"
    code = ("import os; from pathlib import Path; from trainer.lock import Lock; "
            f"Lock(Path({str(path)!r}), 'killed', 60).__enter__(); os._exit(1)")
    subprocess.run([sys.executable, "-c", code], check=False)
    assert json.loads(path.read_text())["holder"] == "killed"
    began = time.monotonic()
    with Lock(path, "next", 60):
        assert time.monotonic() - began < 5


def test_unreadable_lock_is_taken_over_after_the_lease(tmp_path):
    path = tmp_path / "lock.json"
    path.write_text('{"holder": "torn')
    with Lock(path, "next", LEASE):
        assert json.loads(path.read_text())["holder"] == "next"


def test_of_many_that_wait_for_a_stale_lock_one_gets_it(tmp_path):
    path = tmp_path / "lock.json"
    assert Lock(path, "gone", LEASE)._create()
    foreign(path)
    results, done = [], threading.Event()

    def contend(name):
        try:
            with Lock(path, name, LEASE):
                results.append(("got", name))
                done.wait(10)
        except Held as error:
            results.append(("held", error.holder))

    threads = [threading.Thread(target=contend, args=(f"n{i}",)) for i in range(5)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(results) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    done.set()
    for thread in threads:
        thread.join()
    winners = [name for kind, name in results if kind == "got"]
    assert len(winners) == 1 and sorted(kind for kind, _ in results) == ["got"] + ["held"] * 4
    assert all(holder == winners[0] for kind, holder in results if kind == "held")


def test_holder_that_stood_still_learns_that_it_lost(tmp_path):
    path = tmp_path / "lock.json"
    lost = threading.Event()
    with Lock(path, "slow", LEASE, lost.set):
        path.write_text(json.dumps({"holder": "other", "token": "x", "count": 1}))
        assert lost.wait(5 * LEASE)
    assert json.loads(path.read_text())["holder"] == "other"
