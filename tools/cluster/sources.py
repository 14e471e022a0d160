"""Programs built from source, each from a Go module in tools/cluster/sources that pins it with checksums.

Go's module and build caches are kept in the project's cache; the builds share them, so the same flags are used everywhere.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools import shell
from tools.cluster.settings import Settings
from tools.errors import OperatorError
from tools.layout import Layout

SOURCES = Path(__file__).parent / "sources"
KEEP = "build.sha256"


@dataclass(frozen=True)
class Source:
    """One Go module of tools/cluster/sources and the programs that it gives."""

    name: str
    """Folder of the module."""
    programs: tuple[str, ...]
    """Names of the binaries."""
    expected: float
    """Seconds that the build takes on two cores with empty caches."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Binaries whose package's name says nothing: (as built, as kept)."""
    stamps: tuple[str, ...] = ()
    """Linker stamps `package.variable=value`."""


def sources(settings: Settings) -> list[Source]:
    """Everything that `make up` builds, the largest first."""
    # pyhelm3 reads the version, and takes only a whole one.
    helm = Source("helm", ("helm",), 100, stamps=(f"helm.sh/helm/v4/internal/version.version={settings.helm_version}",))
    kubernetes, *others = of_kubernetes(settings)
    return [
        kubernetes,
        helm,
        Source("argocd", ("argocd",), 200),
        Source("kuberay", ("ray-operator", "rayjob-submitter"), 90, renamed=(("cmd", "rayjob-submitter"),)),
        *others,
        Source("netpol", ("netpol",), 45),
    ]


def of_kubernetes(settings: Settings) -> list[Source]:
    """What a cluster needs by itself, the largest first."""
    major, minor, _ = settings.kubernetes_version.removeprefix("v").split(".")
    version = "k8s.io/component-base/version"
    return [
        Source("kubernetes", ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubeadm", "kubectl"),
               360, stamps=(f"{version}.gitVersion={settings.kubernetes_version}", f"{version}.gitMajor={major}",
                            f"{version}.gitMinor={minor}", f"{version}.gitTreeState=clean")),
        Source("coredns", ("coredns",), 65),
        Source("etcd", ("etcd",), 30),
    ]


FLANNEL = Source("flannel", ("flannel",), 90)
"""Of clusters with more than one server (tools/cluster/site.py)."""


def environment(layout: Layout) -> dict[str, str]:
    """Go's environment: own caches, static binaries, and exactly what go.sum pins. A newer toolchain may be fetched if the host's
    is too old."""
    return {"GOMODCACHE": str(layout.cache / "go/mod"), "GOCACHE": str(layout.cache / "go/build"), "CGO_ENABLED": "0",
            "GOFLAGS": "-mod=readonly -modcacherw -trimpath", "GOTOOLCHAIN": "auto", "GOWORK": "off"}


def go_binary() -> str:
    """The host's Go."""
    found = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if not found:
        raise OperatorError("Go is not on the PATH. Install Go 1.21 or later (it fetches the version it needs itself), then run again.")
    return found


def module_directory(layout: Layout, name: str, module: str) -> Path:
    """Where a module that source `name` requires lies in the module cache (CRDs and manifests are taken from there)."""
    found = shell.output([go_binary(), "list", "-m", "-f", "{{.Dir}}", module], cwd=SOURCES / name, env=environment(layout)).strip()
    if not found:
        shell.output([go_binary(), "mod", "download", module], cwd=SOURCES / name, env=environment(layout), timeout=600)
        found = shell.output([go_binary(), "list", "-m", "-f", "{{.Dir}}", module], cwd=SOURCES / name, env=environment(layout)).strip()
    return Path(found)


def _fingerprint(source: Source) -> str:
    digest = hashlib.sha256(repr((source.programs, source.stamps)).encode())
    for path in sorted((SOURCES / source.name).iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def built(source: Source, layout: Layout) -> bool:
    """Whether the programs are there, built from these very sources."""
    mark = layout.bin / f".{source.name}.{KEEP}"
    return (mark.exists() and mark.read_text() == _fingerprint(source)
            and all(os.access(layout.bin / p, os.X_OK) for p in source.programs))


def build(source: Source, layout: Layout, say: Callable[[str], None]) -> bool:
    """Build a source's programs into the cache's bin folder. Returns False if they were there."""
    if built(source, layout):
        return False
    folder = SOURCES / source.name
    stage = layout.cache / "go/stage" / source.name
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    own = (folder / "main.go").exists()
    flags = " ".join(["-s", "-w", *(f"-X {s}" for s in source.stamps)])
    log = layout.logs / f"build-{source.name}.log"
    say("downloading and compiling")
    # A module of our own has one main package; the others name theirs as tools.
    shell.run([go_binary(), "build", "-ldflags", flags, "-o", str(stage / source.name) if own else f"{stage}/", "." if own else "tool"],
              log, cwd=folder, env=environment(layout))
    layout.bin.mkdir(parents=True, exist_ok=True)
    names = dict(source.renamed)
    for binary in stage.iterdir():
        os.replace(binary, layout.bin / names.get(binary.name, binary.name))
    (layout.bin / f".{source.name}.{KEEP}").write_text(_fingerprint(source))
    shutil.rmtree(stage)
    return True
