"""Where things lie on an operator's machine: the checkout, the cache, and the state of the local cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
"""The checkout that this module belongs to."""


def _cache() -> Path:
    if explicit := os.environ.get("LLM_FINETUNE_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-finetune"


@dataclass(frozen=True)
class Layout:
    """The cache survives `make down` (builds, images, the runs on the local storage); the state does not."""

    cache: Path = field(default_factory=_cache)
    state: Path = Path("/var/lib/llm-finetune")
    runtime: Path = Path("/run/llm-finetune")

    @property
    def bin(self) -> Path:
        """Programs built from source."""
        return self.cache / "bin"

    @property
    def debian(self) -> Path:
        """Debian packages unpacked beside the host's own, not installed."""
        return self.cache / "debian"

    @property
    def logs(self) -> Path:
        """The one folder of logs."""
        return self.cache / "logs"

    @property
    def storage(self) -> Path:
        """The local environment's shared storage: base models and runs."""
        return self.cache / "storage"

    @property
    def kubeconfig(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def uv(self) -> Path:
        """Put there by the Makefile."""
        return self.cache / "bootstrap/bin/uv"

    @property
    def helm(self) -> Path:
        return self.bin / "helm"

    @property
    def kubectl(self) -> Path:
        return self.bin / "kubectl"

    def environment(self) -> dict[str, str]:
        """Environment variables with which the unpacked and the built programs run."""
        root = self.debian / "root"
        libraries = [root / "usr/lib/x86_64-linux-gnu", root / "lib/x86_64-linux-gnu"]
        path = [self.bin, root / "usr/bin", root / "usr/sbin", root / "bin", root / "sbin"]
        return {
            "PATH": ":".join([*map(str, path), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]),
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "KUBECONFIG": str(self.kubeconfig),
        }
