"""The chart's own NFS server and a kernel's NFS client on another machine (a guest): who may mount and read, what the trainer's storage
code finds there, and what is left of a checkpoint when the server stops, dies, or has no room. Prints the times that docs/reliability.md
gives (pytest -s)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.nodes.guest import Guest, GuestError
from tests.nodes.nfs import DISK_GIB, MOUNT, UID, SecondClient, Server, Work, as_user, background, python, refused, work
from tests.waiting import wait_for
from tools.cluster.settings import Settings

CHECKPOINT_MB = 128
"""Large enough to be under way for seconds, small enough for several on the disk."""
OUTAGE_S = 60
GRACE_S = 30
GATE = "/tmp/nfs-test-gate"
"""Files in the guest that let its work go on."""
REFUSED = r"No such file or directory|access denied|not permitted"
"""What mount says: the server does not tell a client that it may not see from one that is not there."""
FORBIDDEN = r"Permission denied|Operation not permitted"
LOST = {"soft", "softerr", "softreval", "nolock", "nconnect", "sync"}
CAPABILITIES = {"DAC_OVERRIDE": 1, "DAC_READ_SEARCH": 2, "FOWNER": 3, "SETGID": 6, "SETUID": 7}
"""Their bits in /proc/<pid>/status."""


@pytest.fixture(scope="module")
def machine() -> Iterator[Guest]:
    """The client: a guest beside the one that other tests kill and cut off."""
    octet = Settings().octet
    guest = Guest(name="nfs-client", address=f"10.{octet}.0.3/24", gateway=f"10.{octet}.0.1", tap="llmft-tap3", memory="1536M", disk_gib=4)
    guest.remove()
    guest.build()
    guest.boot()
    yield guest
    guest.remove()


@pytest.fixture(scope="module")
def options(server: Server) -> str:
    """Mount options of the chart's PersistentVolume."""
    volume = next(o for o in server.objects if o["kind"] == "PersistentVolume")
    assert volume["spec"]["nfs"] == {"server": server.address, "path": "/storage"}
    return ",".join(volume["spec"]["mountOptions"])


@pytest.fixture(scope="module")
def guest(machine: Guest, server: Server, options: str) -> Guest:
    """The client with the export mounted as the kubelet would."""
    machine.run(f"mkdir -p {MOUNT}; mount -t nfs -o {options} {server.address}:/storage {MOUNT}")
    return machine


@pytest.fixture
def folder(guest: Guest, server: Server, request: pytest.FixtureRequest) -> Iterator[str]:
    """A directory of the export for one test."""
    name = request.node.name
    guest.run(as_user(UID, f"mkdir {MOUNT}/{name}"))
    yield f"{MOUNT}/{name}"
    guest.run(f"rm -rf {MOUNT}/{name}", timeout=180)


@pytest.fixture(scope="module")
def second(guest: Guest, server: Server, options: str) -> Iterator[SecondClient]:
    client = SecondClient(guest, server.settings, server.address, options)
    yield client
    client.remove()


# --- who may mount, and as whom


def test_only_the_named_clients_mount(machine: Guest, server: Server, options: str) -> None:
    """The same machine, as the server sees it without its Service: an address that is not in the list."""
    pod = server.pod().status.pod_ip
    assert re.search(REFUSED, refused(machine, options, f"{pod}:/storage"))
    # The root above the exports belongs to no one, and shows none of them.
    seen = machine.run(f"mkdir -p /mnt/root; mount -t nfs -o {options} {pod}:/ /mnt/root && ls -A /mnt/root && umount /mnt/root")
    assert seen == ""


def test_the_network_lets_only_the_named_clients_through(machine: Guest, server: Server) -> None:
    """The NetworkPolicy, before the server is asked: another address of the same machine gets no connection."""
    own, other = machine.address.partition("/")[0], machine.address.partition("/")[0].rpartition(".")[0] + ".99"
    machine.run(f"ip address add {other}/24 dev vec0")

    def connect(source: str) -> str:
        program = f"import socket; socket.create_connection(('{server.address}', 2049), 10, ('{source}', 0)).close()"
        return machine.run(f'python3 -c "{program}" 2>&1 || true', timeout=30)
    assert connect(own) == ""
    assert re.search("ConnectionRefusedError|TimeoutError", connect(other))


def test_users_without_root_cannot_speak_nfs(machine: Guest, server: Server, options: str) -> None:
    """A program that brings its own NFS client would say whichever uid it likes: it has no reserved port.

    Before the export is mounted: a second mount of the same server would go over the first one's connection.
    """
    assert re.search(REFUSED, refused(machine, f"{options},noresvport", f"{server.address}:/storage"))


def test_mount_options(guest: Guest) -> None:
    """What the kernel made of the chart's options, and of those that the chart leaves alone or refuses."""
    line = guest.run(f"grep ' {MOUNT} ' /proc/mounts").split()
    assert line[2] == "nfs4"
    options = dict(word.partition("=")[::2] for word in line[3].split(","))
    assert {"rw", "hard", "noatime"} <= options.keys() and not LOST & options.keys()
    assert options["vers"] == "4.1" and options["proto"] == "tcp" and options["sec"] == "sys" and options["local_lock"] == "none"


def test_a_clients_root_is_nobody_special(guest: Guest, server: Server, folder: str) -> None:
    guest.run(f"touch {folder}/of-root; mkdir {folder}/directory-of-root")
    for name in ("of-root", "directory-of-root"):
        status = (server.storage / Path(folder).name / name).stat()
        assert (status.st_uid, status.st_gid) == (UID, UID)
    other = server.storage / Path(folder).name / "secret"
    other.write_text("of another user")
    other.chmod(0o600)
    shutil.chown(other, 2000, 2000)
    for command in (f"cat {folder}/secret", f"chown 0:0 {folder}/of-root", f"chown 2000 {folder}/of-root", f"chmod 4755 {folder}/secret"):
        with pytest.raises(GuestError, match=FORBIDDEN):
            guest.run(command)


def test_another_user_reads_and_writes_nothing(guest: Guest, server: Server, folder: str) -> None:
    """Files have the modes that the trainer gives them; the export's own directory shuts others out."""
    work(guest, f"checkpoint_work {folder}/checkpoints --megabytes 1")
    work(guest, f"storage_work shards {folder}")
    guest.run("echo 3 > /proc/sys/vm/drop_caches")
    for command in (f"ls {MOUNT}", f"ls {folder}", f"cat {folder}/checkpoints/step-1/manifest.json", f"cat {folder}/dataset/manifest.json",
                    f"touch {folder}/new", f"rm {folder}/dataset/manifest.json", f"ln {folder}/dataset/manifest.json /tmp/link"):
        with pytest.raises(GuestError, match=FORBIDDEN):
            guest.run(as_user(2000, command))
    assert oct(server.storage.stat().st_mode & 0o7777) == "0o750"


# --- what the trainer's storage code finds


def measure(guest: Guest, command: str, folder: str, *more: str, client: SecondClient | None = None) -> dict[str, Any]:
    """A measurement of the site check."""
    line = f"{python(guest)} -m trainer.sitecheck {command} --directory {folder} {' '.join(more)}"
    found: dict[str, Any] = json.loads((client.run(line) if client else guest.run(line)).splitlines()[-1])
    return found


def both(guest: Guest, second: SecondClient, here: list[str], there: list[str], folder: str) -> list[dict[str, Any]]:
    """Two sides of a measurement at once, on two clients."""
    theirs = folder.replace(MOUNT, f"{MOUNT}-second", 1)
    with ThreadPoolExecutor(2) as pool:
        sides = [pool.submit(measure, guest, here[0], folder, *here[1:]),
                 pool.submit(measure, guest, there[0], theirs, *there[1:], client=second)]
        return [side.result() for side in sides]


def test_fsync(guest: Guest, folder: str) -> None:
    found = measure(guest, "fsync", folder)
    print(f"fsync: median {found['fsync_ms']:.1f} ms, 99th percentile {found['fsync_p99_ms']:.1f} ms")
    assert 0 < found["free_bytes"] <= DISK_GIB << 30


def test_throughput(guest: Guest, second: SecondClient, folder: str) -> None:
    """Written by one client, read by the other."""
    written = measure(guest, "write", folder, "--megabytes", "256")
    found = measure(guest, "read", folder.replace(MOUNT, f"{MOUNT}-second", 1), client=second)
    print(f"write with fsync {written['write_mb_s']:.0f} MB/s, read by another client {found['read_mb_s']:.0f} MB/s")
    assert found["read_whole"]


def test_rename_is_atomic_for_another_client(guest: Guest, second: SecondClient, folder: str) -> None:
    renamed, watched = both(guest, second, ["renames"], ["watches"], folder)
    print(f"{renamed['renames_s']:.0f} renames a second; seen by another client: {watched}")
    assert renamed["renames"] > 10 and watched["whole"] > 10
    assert watched["torn"] == watched["missing"] == 0


def test_locks_hold_between_clients(guest: Guest, second: SecondClient, folder: str) -> None:
    held, tried = both(guest, second, ["holds"], ["tries"], folder)
    assert held["held"] and tried["lock_refused"] and tried["flock_refused"] and tried["released"]
    a, b = both(guest, second, ["races", "--name", "a"], ["races", "--name", "b"], f"{folder}/race")
    assert sorted(a["won"] + b["won"]) == list(range(a["rounds"]))


def saves(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The outcome of each step."""
    return [line for line in lines if "step" in line]


def whole(lines: list[dict[str, Any]], *steps: int) -> None:
    """At the end these steps are there and whole, nothing else is, and a restart takes the last with its right content."""
    end = lines[-1]
    assert end["end"] == list(steps) and end["right"] and end["restored"] == steps[-1], end
    assert end["names"] == [f"step-{step}" for step in steps], end


def test_checkpoints_and_shards(guest: Guest, folder: str) -> None:
    lines = work(guest, f"checkpoint_work {folder}/checkpoints --count 3 --megabytes {CHECKPOINT_MB}")
    assert [line["saved"] for line in saves(lines)] == [True] * 3
    whole(lines, 1, 2, 3)
    data = work(guest, f"storage_work shards {folder}")[0]
    assert data["right"] and data["manifest"]
    print(f"a checkpoint of {CHECKPOINT_MB} MB takes {min(line['seconds'] for line in saves(lines)):.1f} s; shards {data}")


# --- faults


def under_way(server: Server, folder: str, step: int) -> None:
    """Until a checkpoint's file is being written."""
    where = server.storage / Path(folder).name / "checkpoints"
    wait_for(lambda: any(path.stat().st_size > 1 << 20 for path in where.glob(f".step-{step}.*/rank-*")), 300, f"step {step} begins", 0.02)


def test_server_away_in_a_checkpoint(guest: Guest, server: Server, folder: str) -> None:
    """The writer waits: no error, no second try, nothing lost."""
    saving = Work(guest, f"checkpoint_work {folder}/checkpoints --count 3 --megabytes {CHECKPOINT_MB}")
    under_way(server, folder, 2)
    with server.stopped(OUTAGE_S):
        assert [line["step"] for line in saves(saving.lines())] == [1]
    ready = time.time()
    lines = saving.end()
    second = saves(lines)[1]
    print(f"server away for {OUTAGE_S} s in a checkpoint: finished {second['at'] - ready:.1f} s after it was ready again")
    assert [line["saved"] for line in saves(lines)] == [True] * 3 and second["seconds"] > OUTAGE_S
    whole(lines, 1, 2, 3)


def test_server_away_in_a_read(guest: Guest, server: Server, folder: str) -> None:
    measure(guest, "write", folder, "--megabytes", "1000")
    guest.run("echo 3 > /proc/sys/vm/drop_caches")
    reading = Work(guest, f"storage_work read {folder}/file")
    reading.until("begins", "file")
    with server.stopped(OUTAGE_S):
        assert len(reading.lines()) == 1, "the read is not over"
    ready = time.time()
    found = reading.end()[1]
    print(f"server away for {OUTAGE_S} s in a read: over {found['at'] - ready:.1f} s after it was ready again")
    assert found["read_whole"] and found["at"] > ready


def test_server_killed_in_a_checkpoint(guest: Guest, second: SecondClient, server: Server, folder: str) -> None:
    """It finds its clients again in the recovery directory, gives them their files and locks back, and others nothing before that."""
    lock = f"{folder}/lock"
    holder = (f"exec 9>>{lock}; flock -n 9 || exit 1; touch {folder}/locked; "
              f"while [ ! -e {folder}/over ]; do sleep 0.5; echo still >&9 || exit 2; done; exit 0")
    background(guest, f"{as_user(UID, holder)}; echo $? > /tmp/holder")
    theirs = lock.replace(MOUNT, f"{MOUNT}-second", 1)
    wait_for(lambda: (server.storage / Path(folder).name / "locked").exists(), 30, "the lock is held")
    taken = second.inside(as_user(UID, f"flock -n {theirs} echo taken || echo refused"))
    assert guest.run(taken) == "refused\n"
    saving = Work(guest, f"checkpoint_work {folder}/checkpoints --count 3 --megabytes {CHECKPOINT_MB}")
    under_way(server, folder, 2)
    restarts = server.pod().status.container_statuses[0].restart_count
    server.kill()
    killed = time.time()
    # The first try after the kill waits for the server and its grace period.
    assert guest.run(taken, timeout=GRACE_S + 150) == "refused\n", "the lock went to another client"
    refused_after = time.time() - killed
    lines = saving.end()
    print(f"server killed in a checkpoint: finished {saves(lines)[1]['at'] - killed:.1f} s after the kill; another client's lock refused "
          f"after {refused_after:.1f} s")
    assert server.pod().status.container_statuses[0].restart_count == restarts + 1
    assert [line["saved"] for line in saves(lines)] == [True] * 3
    whole(lines, 1, 2, 3)
    guest.run(as_user(UID, f"touch {folder}/over"))
    assert wait_for(lambda: guest.run("cat /tmp/holder 2>/dev/null || true"), 30, "the holder ends") == "0\n", "the holder lost its lock"
    assert guest.run(taken) == "taken\n"
    assert "reclaim complete" in server.log()


def test_disk_full_in_a_checkpoint(guest: Guest, server: Server, folder: str) -> None:
    """The room goes while the checkpoint is written: the one before stays, and nothing partial has a checkpoint's name."""
    guest.run(f"rm -f {GATE}-*")
    saving = Work(guest, f"checkpoint_work {folder}/checkpoints --count 4 --megabytes {CHECKPOINT_MB} --gate {GATE}")
    saving.until("step", 1)
    fillers = [server.disk.folder / name for name in ("filler", "filler-2")]

    def leave(room: int, filler: Path) -> None:
        subprocess.run(["fallocate", "--length", str(shutil.disk_usage(server.disk.folder).free - room), filler], check=True)

    try:
        leave(2 * CHECKPOINT_MB << 20, fillers[0])
        guest.run(f"touch {GATE}-2")
        under_way(server, folder, 2)
        leave(0, fillers[1])
        line = saving.until("step", 2)
        print(f"disk full in a checkpoint: {line['message']}")
        assert not line["saved"] and "the storage is full" in line["message"] and line["whole"] == [1]
        guest.run(f"touch {GATE}-3")
        line = saving.until("step", 3)  # not enough for another: said before anything is written
        assert not line["saved"] and "are needed" in line["message"] and line["whole"] == [1]
    finally:
        for filler in fillers:
            filler.unlink(missing_ok=True)
    guest.run(f"touch {GATE}-4 {GATE}-end")
    lines = saving.end()
    assert saves(lines)[3]["saved"], "with room again it goes on"
    whole(lines, 1, 4)


def test_handles_survive_another_device_number(guest: Guest, server: Server, folder: str) -> None:
    """After a reboot the disk may be another device: open files stay open (ext4's handles hold its UUID)."""
    guest.run(f"rm -f {GATE}-* /tmp/read")
    guest.run(as_user(UID, f"echo before > {folder}/file"))
    background(guest, f"exec 8<{folder}/file; while [ ! -e {GATE}-read ]; do sleep 0.2; done; cat <&8 >/tmp/read 2>&1")
    server.stop()
    before = server.disk.device
    server.disk.unmount()
    server.disk.mount(other_than=before)
    assert server.disk.device != before
    server.start()
    guest.run(f"echo 3 > /proc/sys/vm/drop_caches; touch {GATE}-read")
    assert wait_for(lambda: guest.run("cat /tmp/read 2>/dev/null || true"), 60, "the open file is read") == "before\n"


def test_stale_handle(guest: Guest, second: SecondClient, server: Server, folder: str) -> None:
    """A checkpoint that goes while a client has it open: an error there, never other bytes, and the next look finds what is whole."""
    guest.run(f"rm -f {GATE}-* /tmp/read; touch {GATE}-2")
    saving = Work(guest, f"checkpoint_work {folder}/checkpoints --count 2 --gate {GATE}")
    saving.until("step", 2)
    file = f"{folder}/checkpoints/step-1/rank-00000.safetensors"
    background(guest, f"exec 8<{file}; while [ ! -e {GATE}-read ]; do sleep 0.2; done; sha256sum <&8 >/tmp/read 2>&1")
    time.sleep(1)
    second.run(as_user(UID, f"rm -rf {folder.replace(MOUNT, f'{MOUNT}-second', 1)}/checkpoints/step-1"))
    server.kill()  # what it had open for the first client it has no more
    guest.run(f"echo 3 > /proc/sys/vm/drop_caches; touch {GATE}-read", timeout=150)
    said = wait_for(lambda: guest.run("cat /tmp/read 2>/dev/null || true"), 150, "the removed file is read")
    print(f"a removed file that was open, after the server's restart: {said.strip()}")
    assert re.search(r"Stale file handle|Bad file descriptor|Input/output error", said), said
    guest.run(f"touch {GATE}-end")
    whole(saving.end(), 2)


def test_server_needs_no_more_than_it_has(server: Server) -> None:
    """Root with five capabilities, read-only root file system, nothing of the host but its directory."""
    pid = int(next(path.name for path in Path("/proc").glob("[0-9]*") if _command(path).startswith("/usr/bin/ganesha.nfsd")))
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    assert int(status["CapBnd"], 16) == sum(1 << bit for bit in CAPABILITIES.values())
    assert status["NoNewPrivs"] == "1"
    root = next(line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines() if line.split()[4] == "/")
    assert "ro" in root[5].split(",")


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
