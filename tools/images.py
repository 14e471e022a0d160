"""Builds the images with buildah, without a container engine and without pulling anything, and pushes them to a registry.

Layers go to the registry uncompressed when it is the node's own (a registry on the same disk gains nothing from gzip, which would
take minutes for the 5 GB of CUDA libraries), and compressed when it is a site's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

from tools import shell
from tools.errors import OperatorError
from tools.layout import REPOSITORY, Layout

Say = Callable[[str], None]
SUITE = "bookworm"
POLICY = {"default": [{"type": "insecureAcceptAnything"}]}
CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")


@dataclass(frozen=True)
class Image:
    """One image: a folder of images/, or a target of its Dockerfile."""

    name: str
    """Its name in a registry, below the project's."""
    folder: str
    """Folder of images/."""
    base: str = ""
    """Image that it starts from. Without one it is a minimal Debian with the packages of images/<folder>/packages, of release SUITE or from
    images/<folder>/sources."""
    inputs: tuple[str, ...] = ()
    """Files and folders of the checkout that go into it."""
    programs: tuple[str, ...] = ()
    """Programs built from source that go into it; its context is then the cache's bin folder."""
    target: str = ""
    """Stage of the Dockerfile."""
    local_only: bool = False
    """Runs in the embedded cluster only: sites use the upstream image."""


PROGRAMS = {"kubernetes": ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "etcd", "coredns"),
            "flannel": ("flannel",), "node": ("ray-operator", "rayjob-submitter", "argocd", "helm")}
"""Programs built from source that the folders' images add to their base."""


def _node(name: str, folder: str, base: str) -> Image:
    return Image(name, folder, base, programs=PROGRAMS[folder], target=name, local_only=True)


IMAGES = {image.name: image for image in (
    Image("base", "base", inputs=("images/base/packages",)),
    Image("torch", "torch", "base", inputs=("trainer/pyproject.toml", "trainer/uv.lock")),
    Image("trainer", "trainer", "torch", inputs=("trainer",)),
    Image("chatbot", "chatbot", "torch", inputs=("chatbot",)),
    Image("nfs-server", "nfs-server", inputs=("images/nfs-server/packages", "images/nfs-server/sources")),
    *(_node(name, "kubernetes", "base") for name in ("kubernetes", "coredns", "pause")),
    _node("flannel", "flannel", "kubernetes"),
    *(_node(name, "node", "kubernetes") for name in ("kuberay-operator", "argocd")),
)}
"""All images, each after its base."""

PUBLISHED = ("trainer", "chatbot", "nfs-server")
"""What a site runs of them. The local cluster has no NFS server: its tests build that image when they need it."""


class Builder:
    """buildah with its own storage in the cache."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.folder = layout.cache / "images"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "policy.json").write_text(json.dumps(POLICY))
        (self.folder / "registries.conf").write_text("unqualified-search-registries = []\n")
        (self.folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{self.folder}/storage"\nrunroot = "{layout.runtime}/buildah"\n')
        self.env = {**layout.environment(), "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
                    "CONTAINERS_REGISTRIES_CONF": str(self.folder / "registries.conf"), "BUILDAH_ISOLATION": "chroot",
                    "TMPDIR": str(self.folder), "HOME": str(self.folder)}

    def _log(self, image: Image) -> Path:
        return self.layout.logs / f"image-{image.name}.log"

    def _mark(self, image: Image) -> Path:
        return self.folder / f"{image.name}.sha256"

    def fingerprint(self, image: Image) -> str:
        """Hash over everything that goes into an image, its base included."""
        digest = hashlib.sha256(repr(image).encode())
        if image.base:
            digest.update(self.fingerprint(IMAGES[image.base]).encode())
        paths: list[Path] = [REPOSITORY / "images" / image.folder / "Dockerfile"]
        for name in image.inputs:
            path = REPOSITORY / name
            paths += sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts) if path.is_dir() else [path]
        for program in image.programs:
            stat = (self.layout.bin / program).stat()
            digest.update(f"{program} {stat.st_size} {stat.st_mtime_ns}".encode())
        for path in paths:
            digest.update(str(path.relative_to(REPOSITORY)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def built(self, image: Image) -> bool:
        """Whether the image is in buildah's storage, made from these very inputs."""
        mark = self._mark(image)
        return (mark.exists() and mark.read_text() == self.fingerprint(image)
                and shell.succeeds(["buildah", "inspect", "--type", "image", f"localhost/{image.name}"], env=self.env))

    def build(self, image: Image, say: Say) -> bool:
        """Build one image (its base must be there). Returns False if it was there."""
        if self.built(image):
            return False
        log = self._log(image)
        context = REPOSITORY
        if not image.base:
            context = self.folder / image.name
            self._rootfs(image, context, log, say)
        elif image.programs:
            context = self.layout.bin
        say("building")
        command: list[str | Path] = [
            "buildah", "build", "--signature-policy", self.folder / "policy.json", "--layers", "--force-rm", "--pull=never",
            "--timestamp", "0",
            "--format", "oci",
            "--network", "host", "--file", REPOSITORY / "images" / image.folder / "Dockerfile",
            "--ignorefile", REPOSITORY / ".dockerignore", "--tag", f"localhost/{image.name}"]
        if image.base:
            command += ["--build-arg", f"BASE=localhost/{image.base}"]
        if image.target:
            command += ["--target", image.target]
        command += self._mounts()
        shell.run([*command, context], log, env=self.env)
        if not image.base:
            shutil.rmtree(context)
        self._mark(image).write_text(self.fingerprint(image))
        return True

    def _mounts(self) -> list[str]:
        """uv, its cache, and the host's CA bundle: there during the build, not in the image."""
        if not self.layout.uv.exists():
            raise OperatorError(f"{self.layout.uv} is missing. Call this through make, which puts it there.")
        cache = self.layout.cache / "uv"
        cache.mkdir(parents=True, exist_ok=True)
        mounts = ["--volume", f"{self.layout.uv}:/usr/local/bin/uv:ro", "--volume", f"{cache}:/var/cache/uv:rw"]
        bundle = next((b for b in (os.environ.get("SSL_CERT_FILE", ""), *CA_BUNDLES) if b and Path(b).is_file()), None)
        if bundle:
            mounts += ["--volume", f"{Path(bundle).resolve()}:/etc/ssl/certs/ca-certificates.crt:ro"]
        return mounts

    def _rootfs(self, image: Image, folder: Path, log: Path, say: Say) -> None:
        """A minimal Debian with the image's packages, as a tar file."""
        say("Debian packages")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        lines = (REPOSITORY / "images" / image.folder / "packages").read_text().splitlines()
        packages = ",".join(line.split()[0] for line in lines if line.strip())
        sources = REPOSITORY / "images" / image.folder / "sources"
        release: list[str | Path] = [SUITE, folder / "rootfs.tar"]
        if sources.exists():
            release = [sources.read_text().split()[2], folder / "rootfs.tar", sources]
        root = self.layout.debian / "root"
        shell.run([root / "usr/bin/mmdebstrap", "--variant=minbase", "--mode=root", f"--include={packages}",
                   f"--keyring={root}/usr/share/keyrings", "--aptopt=Acquire::Retries \"3\"",
                   "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/doc/*",
                   "--dpkgopt=path-exclude=/usr/share/locale/*", *release],
                  log, env={**self.env, "PERL5LIB": str(root / "usr/share/perl5"), "SOURCE_DATE_EPOCH": "0"})

    def push(self, image: Image, registry: str, tag: str, say: Say, *, local: bool, name: str = "") -> str:
        """Push an image (under another `name` if one is given); returns its digest. A local registry is spoken to in plain HTTP."""
        name = name or image.name
        reference = f"{registry}/{name}:{tag}"
        known = self.folder / f"{name}.pushed.json"
        entry = {"reference": reference, "fingerprint": self.fingerprint(image)}
        if known.exists():
            last = json.loads(known.read_text())
            if {k: last.get(k) for k in entry} == entry and (not local or _has_manifest(reference, last["digest"])):
                return str(last["digest"])
        say("pushing")
        digest_file = self.folder / f"{name}.digest"
        flags = ["--disable-compression", "--tls-verify=false"] if local else []
        shell.run(["buildah", "push", "--signature-policy", self.folder / "policy.json", *flags, "--digestfile", digest_file,
                   f"localhost/{image.name}", f"docker://{reference}"], self._log(image), env=self.env)
        digest = digest_file.read_text().strip()
        digest_file.unlink()
        known.write_text(json.dumps({**entry, "digest": digest}))
        return digest


def _has_manifest(reference: str, digest: str) -> bool:
    """Whether a plain-HTTP registry holds a manifest."""
    registry, _, rest = reference.partition("/")
    name = rest.rpartition(":")[0]
    accept = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
    try:
        return httpx.head(f"http://{registry}/v2/{name}/manifests/{digest}", headers=accept, timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


VALUES_KEYS = {"trainer": "trainer", "chatbot": "chatbot", "nfs-server": "nfsServer", "kuberay-operator": "kuberayOperator"}
"""Images that charts name, with their key below `global.images`."""


def values(registry: str, tag: str, digests: dict[str, str]) -> dict[str, object]:
    """Helm values that pin images by digest."""
    return {"global": {"images": {key: {"repository": f"{registry}/{name}", "tag": tag, "digest": digests[name]}
                                  for name, key in VALUES_KEYS.items() if name in digests}}}


def labelled(name: str, say: Say) -> Say:
    """`say` with the image's name before the text."""
    return lambda text: say(f"{name}: {text}")


def with_bases(names: Iterable[str]) -> list[Image]:
    """The named images and what they start from, each after its base."""
    wanted: set[str] = set()
    for name in names:
        while name and name not in wanted:
            wanted.add(name)
            name = IMAGES[name].base
    return [image for image in IMAGES.values() if image.name in wanted]


def publish(layout: Layout, registry: str, tag: str, say: Say) -> Path:
    """Build the project's own images, push them to a site's registry, and write their digests to images/digests.yaml.

    `registry` is `host[:port]/path`; log in first with `buildah login`, or name a file of credentials in REGISTRY_AUTH_FILE.
    """
    if not registry or not tag:
        raise OperatorError("Give REGISTRY=host/path and TAG=version, for example: make images REGISTRY=registry.example.com/ml TAG=0.1.0")
    builder = Builder(layout)
    digests = {}
    for image in with_bases(PUBLISHED):
        say(f"{image.name}: building")
        builder.build(image, labelled(image.name, say))
    for name in PUBLISHED:
        digests[name] = builder.push(IMAGES[name], registry, tag, labelled(name, say), local=False)
        say(f"{name}: {registry}/{name}@{digests[name]}")
    path = REPOSITORY / "images/digests.yaml"
    path.write_text("# Written by `make images`: merge into an environment's release.yaml to run these images.\n"
                    + yaml.safe_dump(values(registry, tag, digests), sort_keys=False))
    return path
