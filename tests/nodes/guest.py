"""A second server on this machine: a User-Mode Linux guest with a kernel of its own, which needs neither KVM nor modules of the host.

Its root is the host's, read-only, under a disk of its own, so that it runs the same programs (tests/nodes/init.sh). What its kernel lacks:
packet filters for IPv4 (so no masquerading, no kube-proxy) and a second CPU. By hand, as root:

    python -m tests.nodes.guest boot
    python -m tests.nodes.guest run 'uname -r; mount -t nfs4 10.77.0.1:/export /mnt'
    python -m tests.nodes.guest kill           # as a power cut: the disk stays for the next boot
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tools import shell
from tools.cluster import debian
from tools.cluster.daemons import Daemon
from tools.cluster.settings import Settings
from tools.layout import Layout

KERNEL = {
    "user-mode-linux": "the guest's kernel and its modules",
    "libc6": "what it is linked with",
}
SUITE = "forky"
"""Release of Debian that the kernel is from: an older one (6.1) does not start on CPUs with AMX, and its system calls, which are caught by
ptrace instead of seccomp, take three times as long."""
PACKAGES = {
    "kmod": "loads the kernel's modules",
    "nfs-common": "mounts NFS",
    "iproute2": "its link",
    "socat": "its shell",
}
INIT = Path(__file__).parent / "init.sh"
PORT = 7777
"""Of the guest's shell, which serves its gateway alone."""
END = "=== ended with"


class GuestError(Exception):
    """A command in the guest failed, or the guest does not answer."""


@dataclass(frozen=True)
class Guest:
    """One guest; `name` is its host name too."""

    layout: Layout = field(default_factory=Layout)
    name: str = "guest-1"
    address: str = "10.77.0.2/24"
    gateway: str = "10.77.0.1"
    """The host's address on the guest's network."""
    bridge: str = "llmft0"
    """Device of the host that the guest's link is put on: the local cluster's own."""
    tap: str = "llmft-tap1"
    memory: str = "2048M"
    disk_gib: int = 24
    """Of a sparse file."""
    cpu: int = 1
    """CPU of the host that the guest runs on: its threads take turns, on several CPUs it is ten times slower."""

    @property
    def folder(self) -> Path:
        return self.layout.cache / "tests" / self.name

    @property
    def packages(self) -> Path:
        return self.layout.debian / "guest"

    @property
    def kernel(self) -> Path:
        return self.layout.debian / "guest-kernel"

    @property
    def own_folders(self) -> list[Path]:
        """Folders of the host that the guest has for itself, empty at first: it must not see the host's cluster."""
        cache, state = self.layout.cache, self.layout.state
        system = ("/etc/kubernetes", "/etc/cni", "/var/lib/kubelet", "/var/lib/cni", "/var/log/pods", "/var/log/containers")
        return [state, *map(Path, system), *(cache / n for n in ("bin", "containerd", "logs", "registry", "images", "storage"))]

    def _unpack(self) -> None:
        """Kernel and packages, in the form in which they are laid over the host's root."""
        def say(text: str) -> None:
            print(f"{self.name}: {text}", flush=True)
        debian.unpack(self.layout, say)
        if debian.unpack(self.layout, say, KERNEL, "guest-kernel", SUITE):
            libraries = self.kernel / "usr/lib/x86_64-linux-gnu"
            shell.output(["patchelf", "--set-interpreter", libraries / "ld-linux-x86-64.so.2", "--set-rpath", libraries,
                          self.kernel / "usr/bin/linux.uml"], env=self.layout.environment())
        if not debian.unpack(self.layout, say, PACKAGES, "guest"):
            return
        for name in ("bin", "sbin", "lib"):  # links on the host, which folders of this name would hide
            if (self.packages / name).exists():
                shutil.copytree(self.packages / name, self.packages / "usr" / name, symlinks=True, dirs_exist_ok=True)
                shutil.rmtree(self.packages / name)
        for name in ("etc", "var"):
            shutil.rmtree(self.packages / name, ignore_errors=True)
        for program in (self.packages / "usr/sbin").iterdir():  # kmod's are links to /bin/kmod, which the host may lack
            if program.is_symlink() and os.readlink(program) == "/bin/kmod":
                program.unlink()
                program.symlink_to("../bin/kmod")
        (self.packages / "usr/lib/modules").symlink_to(self.kernel / "usr/lib/uml/modules")

    def build(self) -> None:
        """Kernel and packages, which are kept, and an empty disk, which is made anew."""
        self._unpack()
        for name in ("disk", "root", "packages"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)  # where the guest mounts
        disk = self.folder / "disk.ext4"
        disk.unlink(missing_ok=True)
        with open(disk, "wb") as file:
            file.truncate(self.disk_gib << 30)
        shell.output(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", disk])
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        (self.folder / "cpuinfo").write_text(first + "\n\n")

    def link(self, connected: bool) -> None:
        """The cable between the guest and the host's network; drawn, it is a partition of this server."""
        # The device itself stays up: the guest's end does not recover from a write that fails.
        end = ["master", self.bridge] if connected else ["nomaster"]
        shell.output(["ip", "link", "set", self.tap, *end], env=self.layout.environment())

    def _daemon(self) -> Daemon:
        variables = {"GUEST_FOLDER": self.folder, "GUEST_PACKAGES": self.packages, "GUEST_NAME": self.name, "GUEST_PORT": PORT,
                     "GUEST_ADDRESS": self.address, "GUEST_GATEWAY": self.gateway}
        mac = ":".join(f"{byte:02x}" for byte in (2, 0, *socket.inet_aton(self.address.partition("/")[0])))
        kernel = [self.kernel / "usr/bin/linux.uml", "seccomp=auto", f"umid={self.name}", f"uml_dir={self.folder}/uml/",
                  f"mem={self.memory}", "rootfstype=hostfs", "rootflags=/", "ro", f"init={INIT}", f"ubda={self.folder}/disk.ext4",
                  "con=null", "con0=null,fd:1", f"vec0:transport=tap,ifname={self.tap},mac={mac},depth=128,gro=1",
                  *(f"{name}={value}" for name, value in variables.items()),
                  "GUEST_OWN=" + ":".join(map(str, self.own_folders))]
        # The kernel's console must be a pipe. In a PID namespace of its own, whose end takes every process of the guest along: were only
        # the kernel's own killed, its processes would go on, and their system calls would go to the host's kernel.
        line = f"taskset -c {self.cpu} {shlex.join(map(str, kernel))} 2>&1 </dev/null | cat"
        return Daemon(self.name, ["unshare", "--pid", "--fork", "--kill-child", "bash", "-c", line], ready=self.answers,
                      env={"TMPDIR": "/dev/shm"}, timeout=60)

    def boot(self) -> None:
        """Start it and wait until it answers. Does nothing if it runs."""
        env = self.layout.environment()
        if not Path("/sys/class/net", self.tap).exists():
            shell.output(["ip", "tuntap", "add", "dev", self.tap, "mode", "tap"], env=env)
        shell.output(["ip", "link", "set", self.tap, "up"], env=env)
        self.link(True)
        self._daemon().start(self.layout)

    def running(self) -> bool:
        return self._daemon().pid(self.layout) is not None

    def answers(self) -> bool:
        """Whether a command runs there."""
        try:
            return self.run("echo here", timeout=5) == "here\n"
        except GuestError:
            return False

    def run(self, command: str, timeout: float = 120) -> str:
        """Run a shell command as root in the guest; returns what it prints. Raises GuestError if it fails or the guest does not answer."""
        script = f"bash -c {shlex.quote(command)} </dev/null 2>&1; code=$?; echo; echo '{END}' $code\n"
        output = b""
        try:
            with socket.create_connection((self.address.partition("/")[0], PORT), timeout=timeout) as connection:
                connection.sendall(script.encode())
                connection.shutdown(socket.SHUT_WR)
                deadline = time.monotonic() + timeout
                while END.encode() not in output or not output.endswith(b"\n"):
                    connection.settimeout(max(deadline - time.monotonic(), 0.01))
                    part = connection.recv(65536)
                    if not part:
                        break
                    output += part
        except OSError as error:
            raise GuestError(f"{self.name} does not answer to {command[:200]!r}: {error}\n"
                             + output.decode(errors="replace")[-2000:]) from None
        text, _, code = output.decode(errors="replace").rpartition(f"\n{END}")
        if code.strip() != "0":
            raise GuestError(f"{command[:200]!r} in {self.name} ended with {code.strip() or 'the guest'}:\n{text[-2000:]}")
        return text

    def kill(self) -> None:
        """As a power cut: every process of the guest at once, nothing synced. Its disk and link stay."""
        pid = self._daemon().pid(self.layout)
        if pid is not None:
            # The wrapper's child is the first process of the namespace, and ends after all others there.
            first = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 20
            while any(Path("/proc", child).exists() for child in first):
                if time.monotonic() > deadline:
                    raise GuestError(f"{self.name} (processes {pid}, {first}) does not end")
                time.sleep(0.05)
        self._daemon().pid_file(self.layout).unlink(missing_ok=True)

    def remove(self) -> None:
        """Kill it, and take its link and disk away."""
        self.kill()
        if Path("/sys/class/net", self.tap).exists():
            shell.output(["ip", "link", "delete", self.tap], env=self.layout.environment())
        shutil.rmtree(self.folder, ignore_errors=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("build", "boot", "run", "kill", "remove"))
    parser.add_argument("command", nargs="?", default="")
    parser.add_argument("--memory", default=Guest.memory)
    parser.add_argument("--bridge", default=Settings().link)
    options = parser.parse_args()
    guest = Guest(memory=options.memory, bridge=options.bridge)
    if options.action == "run":
        try:
            print(guest.run(options.command, timeout=3600), end="")
        except GuestError as error:
            sys.exit(str(error))
    elif options.action == "boot":
        if not guest.running() and not (guest.folder / "disk.ext4").exists():
            guest.build()
        guest.boot()
    else:
        getattr(guest, options.action)()


if __name__ == "__main__":
    main()
