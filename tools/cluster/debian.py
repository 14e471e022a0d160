"""Debian packages that the local cluster needs, unpacked into the cache: nothing is installed on the host, so nothing that the host
runs (another containerd, say) is replaced, and no service is started."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from tools import shell
from tools.errors import OperatorError
from tools.layout import Layout

PACKAGES = {
    "containerd": "container runtime of the node",
    "runc": "runs the containers",
    "containernetworking-plugins": "pod network: ptp, host-local, portmap",
    "buildah": "builds the images",
    "docker-registry": "the node's registry for images and charts",
    "mmdebstrap": "makes the base image",
    "debian-archive-keyring": "checks the base image's packages",
    "iproute2": "the node's address",
    "nftables": "masquerading of pods",
    "iptables": "called by the portmap plugin and by the NetworkPolicy controller",
    "ipset": "called by the NetworkPolicy controller",
    "socat": "localhost ports of dashboard and chatbot",
    "catatonit": "the pause container",
    "patchelf": "lets buildah find its libraries (see below)",
}


def _apt(layout: Layout) -> list[str]:
    """apt-get with its own lists and archives, so that the host's are not touched."""
    folder = layout.debian
    for name in ("lists/partial", "archives/partial", "cache"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return ["apt-get", "-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache",
            "-o", f"Dir::Cache::archives={folder}/archives", "-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root",
            "-o", "Acquire::Retries=3", "-q", "-y"]


def _another_release(layout: Layout, suite: str) -> list[str]:
    """apt-get for another release of Debian than the host's, from the host's mirror."""
    uris = shell.output(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"]).split()
    if not uris:
        raise OperatorError("This host's apt knows no Debian archive (apt-get indextargets); the packages are from there.")
    folder = layout.debian / f"suite-{suite}"
    (folder / "lists/partial").mkdir(parents=True, exist_ok=True)
    (folder / "sources.list").write_text(
        f"deb [signed-by={layout.debian}/root/usr/share/keyrings/debian-archive-keyring.gpg] {uris[0]} {suite} main\n")
    return [*_apt(layout), "-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Etc::sourcelist={folder}/sources.list",
            "-o", "Dir::Etc::sourceparts=-"]


def _fingerprint(layout: Layout, packages: Collection[str]) -> str:
    release = Path("/etc/os-release").read_text()
    return hashlib.sha256(f"{release}{sorted(packages)}{layout.debian}".encode()).hexdigest()


def unpacked(layout: Layout, packages: Collection[str] = PACKAGES, name: str = "root") -> bool:
    """Whether the packages of this host's release are there."""
    mark = layout.debian / name / ".packages"
    return mark.exists() and mark.read_text() == _fingerprint(layout, packages)


def unpack(layout: Layout, say: Callable[[str], None], packages: Collection[str] = PACKAGES, name: str = "root", suite: str = "") -> bool:
    """Download packages, with what the host lacks of their needs, and unpack them into folder `name`. Returns False if they were there.

    With `suite`, exactly these packages of another release of Debian.
    """
    if unpacked(layout, packages, name):
        return False
    log = layout.logs / "debian.log"
    apt = _another_release(layout, suite) if suite else _apt(layout)
    say("package lists")
    shell.run([*apt, "update"], log)
    say("downloading")
    for old in (layout.debian / "archives").glob("*.deb"):
        old.unlink()
    if suite:
        shell.run([*apt, "download", *packages], log, cwd=layout.debian / "archives")
    else:
        # --reinstall: a package that the host has is downloaded all the same, so that the cache does not depend on the host's keeping it.
        shell.run([*apt, "install", "--download-only", "--no-install-recommends", "--reinstall", *packages], log)
    root = layout.debian / name
    stage = layout.debian / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    archives = sorted((layout.debian / "archives").glob("*.deb"))
    for i, archive in enumerate(archives):
        say(f"unpacking {i + 1} of {len(archives)}")
        shell.run(["dpkg-deb", "-x", archive, stage], log)
    # buildah starts a copy of itself in memory inside the image it builds, with that image's environment: neither LD_LIBRARY_PATH
    # nor $ORIGIN reach it, so the libraries' absolute place is written into it.
    if "buildah" in packages:
        shell.run([stage / "usr/bin/patchelf", "--force-rpath", "--set-rpath", root / "usr/lib/x86_64-linux-gnu",
                   stage / "usr/bin/buildah"], log)
    (stage / ".packages").write_text(_fingerprint(layout, packages))
    shutil.rmtree(root, ignore_errors=True)
    stage.rename(root)
    return True
