"""The guest itself: commands run there, and a power cut leaves nothing of it but its disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nodes.guest import Guest, GuestError


def processes(guest: Guest) -> list[str]:
    """Command lines of this machine's processes that belong to the guest."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue  # it has ended
        if f"umid={guest.name}" in words:
            found.append(words)
    return found


def test_commands(guest: Guest) -> None:
    assert guest.run("hostname; cat; echo to standard error >&2") == f"{guest.name}\nto standard error\n"
    with pytest.raises(GuestError, match="ended with 3"):
        guest.run("exit 3")
    with pytest.raises(GuestError, match="timed out"):
        guest.run("sleep 30", timeout=2)


def test_it_is_another_server(guest: Guest) -> None:
    """A kernel with an NFS client, a root that can be written without the host's seeing it, and nothing of the host's cluster."""
    assert guest.run("uname -r").strip() != Path("/proc/sys/kernel/osrelease").read_text().strip()
    assert "nfs4" in guest.run("cat /proc/filesystems")
    guest.run("echo mine > /etc/guest-was-here")
    assert not Path("/etc/guest-was-here").exists()
    assert guest.run(f"ls {guest.layout.state} {guest.layout.bin} /etc/kubernetes | grep -v :$ | grep . || echo none") == "none\n"


def test_power_cut(guest: Guest) -> None:
    guest.run("echo synced > /root-file; sync; echo lost > /other-file")
    assert processes(guest)
    guest.kill()
    assert not processes(guest), "no process of the guest goes on beside its kernel"
    assert not guest.answers()
    guest.boot()
    assert guest.run("cat /root-file") == "synced\n"


def test_cable(guest: Guest) -> None:
    guest.link(False)
    with pytest.raises(GuestError, match="does not answer"):
        guest.run("true", timeout=3)
    guest.link(True)
    assert guest.answers()
