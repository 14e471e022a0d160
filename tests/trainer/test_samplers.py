"""Network and GPU samples."""

import csv
import time

from trainer.paths import RunPaths
from trainer.train import samplers
from trainer.train.samplers import GPU, NETWORK, Network, Sampler

HEAD = "Inter-|   Receive    |  Transmit\n face |bytes    packets errs drop ...\n"


def counters(**interfaces):
    return HEAD + "".join(f"{name:>6}: {rx} 1 0 0 0 0 0 0 {tx} 1 0 0 0 0 0 0\n" for name, (rx, tx) in interfaces.items())


def test_rates_by_interface(tmp_path, monkeypatch):
    path = tmp_path / "dev"
    clock = iter([10.0, 12.0, 13.0, 14.0])
    monkeypatch.setattr(samplers.time, "monotonic", lambda: next(clock))
    network = Network(path)
    path.write_text(counters(eth0=(1000, 500), idle=(0, 0)))
    assert network.rows(100.0, "n") == []
    path.write_text(counters(eth0=(5000, 700), idle=(0, 0), eth1=(9, 9)))
    assert network.rows(102.0, "n") == [("102.000", "n", "eth0", 2000, 100)]
    path.write_text(counters(eth0=(10, 10), eth1=(1009, 9)))  # eth0 was made anew: no negative or huge rate
    assert network.rows(103.0, "n") == [("103.000", "n", "eth1", 1000, 0)]


def test_this_machine_has_counters():
    network = Network()
    assert network.counters() and all(rx >= 0 and tx >= 0 for rx, tx in network.counters().values())


def test_sampler_appends_and_merge_orders_by_time(tmp_path):
    paths = RunPaths(tmp_path)

    class Fixed:
        columns = GPU

        def rows(self, now, node):
            return [(f"{now:.3f}", node, 0, 50, 1 << 30, 300.5, 1500)]

    class Broken:
        columns = NETWORK

        def rows(self, now, node):
            raise OSError("gone")

    for node in ("b/x", "a"):
        sampler = Sampler(paths.samples, {"gpu": Fixed(), "network": Broken()}, node=node, every_s=0.05)
        time.sleep(0.3)
        sampler.close()
    with open(paths.samples / "gpu-a.csv", "a") as file:
        file.write("17")  # a line that a lost node did not finish
    samplers.merge(paths)
    rows = list(csv.reader(paths.gpu.read_text().splitlines()))
    assert tuple(rows[0]) == GPU and len(rows) > 6
    times = [float(row[0]) for row in rows[1:]]
    assert times == sorted(times) and {row[1] for row in rows[1:]} == {"a", "b/x"}
    assert not paths.network.exists()
    samplers.merge(paths)
    assert list(csv.reader(paths.gpu.read_text().splitlines())) == rows


def test_restart_continues_the_same_file(tmp_path):
    class One:
        columns = NETWORK

        def rows(self, now, node):
            return [(now, node, "eth0", 1, 2)]

    for _ in range(2):
        Sampler(tmp_path, {"network": One()}, node="n", every_s=10).close()
    lines = (tmp_path / "network-n.csv").read_text().splitlines()
    assert lines[0].split(",")[0] == "time" and len(lines) >= 3 and sum(line.startswith("time") for line in lines) == 1
