"""The site check's measurements on this machine: loopback, a temporary directory, processes that stand for pods."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from trainer.sitecheck import machine, network, storage


@pytest.fixture
def server() -> Iterator[network.Server]:
    one = network.Server("127.0.0.1", 0)
    yield one
    one.close()


def both(first: Any, second: Any) -> tuple[Any, Any]:
    """Two sides of a measurement at the same time."""
    with ThreadPoolExecutor(2) as pool:
        a, b = pool.submit(first), pool.submit(second)
        return a.result(timeout=60), b.result(timeout=60)


def command(*words: str, **env: str) -> Any:
    done = subprocess.run([sys.executable, "-m", "trainer.sitecheck", *words], capture_output=True, text=True, timeout=100,
                          env={**os.environ, **env}, check=False)
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def test_tcp(server: network.Server) -> None:
    found = network.measure("127.0.0.1", server.port, seconds=0.3, streams=2)
    assert found["gbps"] > 0.1 and 1 < found["latency_us"] <= found["latency_p99_us"] and abs(found["ahead_s"]) < 0.01


def test_a_wrong_clock_is_found(server: network.Server) -> None:
    assert network.ping("127.0.0.1", server.port, clock=lambda: time.time() - 42)["ahead_s"] == pytest.approx(42, abs=0.05)


def test_what_cannot_be_reached_is_said() -> None:
    assert "ConnectionRefusedError" in network.measure("127.0.0.1", free_port())["error"]


def test_bandwidth_counts_what_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver that reads at 20 MB/s is measured as that."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def slow() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
                received, begin = -1, time.monotonic()
                while part := connection.recv(200_000):
                    received += len(part)
                    time.sleep(max(0.0, begin + received / 20e6 - time.monotonic()))
                connection.sendall(json.dumps({"bytes": received, "seconds": time.monotonic() - begin}).encode())
        threading.Thread(target=slow, daemon=True).start()
        assert network.bandwidth("127.0.0.1", listener.getsockname()[1], seconds=1.0, streams=1) == pytest.approx(0.16, rel=0.25)


def test_storage_throughput(tmp_path: Path) -> None:
    assert storage.write(tmp_path / "check", "a", 16)["write_mb_s"] > 1
    found = storage.read(tmp_path / "check", "a")
    assert found["read_whole"] and found["read_mb_s"] > 1
    times = storage.fsyncs(tmp_path / "check", 20)
    assert 0 < times["fsync_ms"] <= times["fsync_p99_ms"]
    assert 0 < storage.space(tmp_path)["free_bytes"] <= storage.space(tmp_path)["total_bytes"]
    storage.remove(tmp_path / "check")
    assert not (tmp_path / "check").exists()


def test_damage_is_found(tmp_path: Path) -> None:
    storage.write(tmp_path, "a", 16)
    with open(tmp_path / "a", "r+b") as file:
        file.seek(5_000_000)
        file.write(b"!")
    assert not storage.read(tmp_path, "a")["read_whole"]
    (tmp_path / "a").write_bytes(b"")
    assert not storage.read(tmp_path, "a")["read_whole"]


def test_renames_are_seen_whole(tmp_path: Path) -> None:
    written, seen = both(lambda: storage.renames(tmp_path, 0.5), lambda: storage.watches(tmp_path))
    assert written["renames"] > 5 and seen["whole"] > 5
    assert (seen["torn"], seen["missing"]) == (0, 0)


def test_writing_in_place_is_seen_torn_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same watch on a file that is not renamed into place."""
    def in_place(path: Path, content: bytes) -> None:
        with open(path, "wb", buffering=0) as file:
            file.write(content[:100])
            time.sleep(0.002)
            file.write(content[100:])

    monkeypatch.setattr(storage, "write_atomic", in_place)
    _, seen = both(lambda: storage.renames(tmp_path, 0.3), lambda: storage.watches(tmp_path))
    assert seen["torn"] > 0


def test_locks_between_two_processes(tmp_path: Path) -> None:
    held, tried = both(lambda: command("holds", "--directory", str(tmp_path)), lambda: command("tries", "--directory", str(tmp_path)))
    assert held == (0, {"held": True})
    assert tried[0] == 0 and tried[1] == {"lock_refused": True, "flock_refused": True, "released": True,
                                          "seen_after_s": tried[1]["seen_after_s"]}


def test_a_lock_that_is_not_held_is_noticed(tmp_path: Path) -> None:
    for name in ("held", "released"):
        (tmp_path / name).touch()
    found = storage.tries(tmp_path)
    assert (found["lock_refused"], found["flock_refused"]) == (False, False)


def test_every_race_has_one_winner(tmp_path: Path) -> None:
    a, b = both(lambda: storage.races(tmp_path, "a"), lambda: storage.races(tmp_path, "b"))
    assert sorted(a["won"] + b["won"]) == list(range(40))


def test_a_side_that_never_comes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE", 0.2)
    with pytest.raises(TimeoutError, match="was not seen"):
        storage.tries(tmp_path)


def test_gloo_all_reduce_over_two_processes() -> None:
    port = str(free_port())

    def side(rank: int) -> Any:
        return command("all-reduce", "--first", str(rank), "--world", "2", "--host", "127.0.0.1", "--port", port, "--megabytes", "4",
                       OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    for code, found in both(lambda: side(0), lambda: side(1)):
        assert code == 0, found
        assert found["gbps"] == pytest.approx(4 * 8e6 / found["seconds"] / 1e9) and found["backend"] == "gloo"


def test_facts_without_a_gpu() -> None:
    found = machine.facts()
    assert found["gpus"] == [] and found["error"] and found["cpus"] >= 1 and found["memory_bytes"] > 1e8
    assert all(card["name"] != "lo" for card in found["cards"])


def test_architectures() -> None:
    image = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
    assert [c for c in [(7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0)] if machine._supported(c, image)] == [
        (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3)]


def test_the_plan_on_the_measured_network() -> None:
    run = {"name": "x", "model": {"name": "meta-llama/Llama-2-7b-hf", "revision": "0" * 40}, "data": {"sample": True}}
    resources = {"workers": 16, "gpus_per_worker": 1, "gpu": "H100-80GB", "node_workers": 8, "network_gbps": 100}
    config = json.dumps({"run": run, "resources": resources, "storage": "/nowhere"})
    fast, slow = (command("plan", "--network-gbps", gbps, LLM_FINETUNE_CONFIG=config)[1] for gbps in ("100", "10"))
    assert fast["workers_gpus"] == 16 and fast["storage_bytes"] > fast["checkpoint_bytes"] > 80e9
    assert slow["network_gbps"] == 10 and slow["step_seconds"] > fast["step_seconds"]


def test_a_wrong_configuration_is_one_line() -> None:
    code, found = command("plan", LLM_FINETUNE_CONFIG="run: {name: X}")
    assert code == 1 and "run" in found["error"]


def test_remove_ends_a_measurement_that_is_under_way(tmp_path: Path) -> None:
    """An interrupted check's `fsync` or `write` would make the directory again."""
    directory = tmp_path / "check"
    directory.mkdir()
    code = "import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, "-m", "trainer.sitecheck", "write", "--directory", str(directory)]) as measuring, \
            subprocess.Popen([sys.executable, "-c", code, "-m", "trainer.sitecheck", "serve"]) as serving:
        try:
            while b"trainer.sitecheck" not in Path(f"/proc/{measuring.pid}/cmdline").read_bytes():
                time.sleep(0.01)
            storage.remove(directory)
            assert measuring.wait(10) == -signal.SIGKILL and not directory.exists()
            assert serving.poll() is None
        finally:
            measuring.kill()
            serving.kill()
