"""The programs that run on every server itself, in the first server's registry: further servers take them from there, by digest."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable

from tools import oci
from tools.cluster.settings import Settings
from tools.errors import OperatorError
from tools.layout import Layout

NAMES = ("kubelet", "kubeadm", "kubectl")
REPOSITORY = "node/programs"
KIND = "application/vnd.llm-finetune.program"
EMPTY = b"{}"
"""The configuration of an artifact that is no image."""


def push(layout: Layout, settings: Settings) -> str:
    """Bring them into the registry; returns the digest of all of them together."""
    registry = oci.Registry(settings.registry, plain_http=True)
    layers = []
    for name in NAMES:
        with open(layout.bin / name, "rb") as file:
            digest, size = oci.digest_of_file(file), file.tell()
            if not registry.has(REPOSITORY, digest):
                file.seek(0)
                registry.push_blob(REPOSITORY, digest, size, file)
        layers.append({"mediaType": KIND, "digest": digest, "size": size, "annotations": {"org.opencontainers.image.title": name}})
    if not registry.has(REPOSITORY, oci.digest_of(EMPTY)):
        registry.push_blob(REPOSITORY, oci.digest_of(EMPTY), len(EMPTY), io.BytesIO(EMPTY))
    document = oci.Document(json.dumps({
        "schemaVersion": 2, "mediaType": oci.MANIFESTS[0], "layers": layers,
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": oci.digest_of(EMPTY), "size": len(EMPTY)}}).encode(),
        oci.MANIFESTS[0])
    registry.push_manifest(REPOSITORY, document.digest, document)
    return document.digest


def fetch(layout: Layout, settings: Settings, digest: str, say: Callable[[str], None]) -> bool:
    """Bring the programs with this digest from the first server into the cache. Returns False if they were there.

    Raises OperatorError if what comes is not what the digest says.
    """
    mark = layout.bin / ".programs.digest"
    if mark.exists() and mark.read_text() == digest and all(os.access(layout.bin / name, os.X_OK) for name in NAMES):
        return False
    registry = oci.Registry(settings.registry, plain_http=True)
    layout.bin.mkdir(parents=True, exist_ok=True)
    for layer in registry.manifest(REPOSITORY, digest).value["layers"]:
        name = layer["annotations"]["org.opencontainers.image.title"]
        if name not in NAMES:
            raise OperatorError(f"{digest} in {settings.registry} holds {name!r}, which is none of {', '.join(NAMES)}.")
        say(name)
        temporary = layout.bin / f".{name}.new"
        content = oci.Checked(registry.blob(REPOSITORY, layer["digest"]), layer)
        with open(temporary, "wb") as file:
            while block := content.read(oci.BLOCK):
                file.write(block)
        content.check()
        temporary.chmod(0o755)
        temporary.rename(layout.bin / name)
    mark.write_text(digest)
    return True
