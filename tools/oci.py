"""Images and charts in registries, and in an OCI image layout: copied byte for byte, so that every digest stays what it was.

The distribution protocol is spoken directly. Credentials come from the file that buildah, podman and docker write (REGISTRY_AUTH_FILE, else
~/.docker/config.json); credential helpers are not called.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from tools.errors import OperatorError

INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
BLOCK = 1 << 20


@dataclass(frozen=True)
class Reference:
    """registry/repository, and a tag or a digest."""

    registry: str
    repository: str
    version: str

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises OperatorError if it names no registry or no version."""
        name, _, digest = text.partition("@")
        registry, _, repository = name.partition("/")
        tag = ""
        if not digest:
            repository, _, tag = repository.rpartition(":")
        if not re.search(r"[.:]|^localhost$", registry) or not repository or not (digest or tag):
            raise OperatorError(f"{text} is not an image in a registry. Write registry.example.com/path/name@sha256:... or :tag.")
        return cls(registry, repository, digest or tag)

    def __str__(self) -> str:
        return f"{self.registry}/{self.repository}{'@' if self.version.startswith('sha256:') else ':'}{self.version}"


@dataclass(frozen=True)
class Document:
    """A manifest or index as its bytes."""

    data: bytes
    media_type: str

    @property
    def digest(self) -> str:
        return digest_of(self.data)

    @property
    def value(self) -> dict[str, Any]:
        return dict(json.loads(self.data))

    @property
    def descriptor(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": len(self.data)}


class Bytes(Protocol):
    """What bytes are read from."""

    def read(self, size: int = -1, /) -> bytes: ...


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_of_file(file: Bytes) -> str:
    """Of what is left to read."""
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _credentials(registry: str) -> str:
    """`Basic ...` for a registry; empty if none are kept."""
    for path in (os.environ.get("REGISTRY_AUTH_FILE", ""), str(Path.home() / ".docker/config.json")):
        if path and Path(path).is_file():
            for name, entry in json.loads(Path(path).read_text()).get("auths", {}).items():
                if re.sub(r"^https?://", "", name).split("/")[0] == registry and entry.get("auth"):
                    return f"Basic {entry['auth']}"
    return ""


class Registry:
    """One registry."""

    def __init__(self, name: str, plain_http: bool = False) -> None:
        self.name = name
        self.url = f"{'http' if plain_http else 'https'}://{name}/v2"
        self.client = httpx.Client(timeout=httpx.Timeout(60, read=300), follow_redirects=True)
        self.authorization = ""

    def _ask(self, method: str, url: str, action: str, repository: str, expect: tuple[int, ...] = (200,), **more: Any) -> httpx.Response:
        """One request; asks for a token if the registry wants one. Raises OperatorError for another status than those expected."""
        for attempt in (1, 2):
            headers = {**more.pop("headers", {}), **({"Authorization": self.authorization} if self.authorization else {})}
            try:
                answer = self.client.request(method, url, headers=headers, **more)
            except httpx.HTTPError as error:
                raise OperatorError(f"{self.name} does not answer ({error}). A registry without TLS needs PLAIN_HTTP=1.") from None
            if answer.status_code == 401 and attempt == 1:
                self.authorization = self._log_in(answer.headers.get("WWW-Authenticate", ""), repository, action)
                more["headers"] = {k: v for k, v in headers.items() if k != "Authorization"}
                continue
            break
        if answer.status_code not in expect:
            raise OperatorError(f"{self.name} answered {answer.status_code} to {method} {url.removeprefix(self.url)}: {answer.text[:200]}"
                                + (" Log in with `buildah login` or `docker login`." if answer.status_code in (401, 403) else ""))
        return answer

    def _log_in(self, challenge: str, repository: str, action: str) -> str:
        basic = _credentials(self.name)
        if not challenge.lower().startswith("bearer"):
            return basic
        fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        scope = {"service": fields.get("service", ""), "scope": f"repository:{repository}:{action}"}
        answer = self.client.get(fields["realm"], params=scope, headers={"Authorization": basic} if basic else {})
        if answer.status_code != 200:
            raise OperatorError(f"{self.name} gives no token for {repository} ({answer.status_code}). Log in with `buildah login`.")
        return f"Bearer {answer.json().get('token') or answer.json()['access_token']}"

    def manifest(self, repository: str, version: str) -> Document:
        """Raises OperatorError if it is not there, or not what its digest says."""
        answer = self._ask("GET", f"{self.url}/{repository}/manifests/{version}", "pull", repository,
                           headers={"Accept": ", ".join((*INDEXES, *MANIFESTS))})
        found = Document(answer.content, answer.headers["Content-Type"].split(";")[0])
        if version.startswith("sha256:") and found.digest != version:
            raise OperatorError(f"{self.name}/{repository}@{version} has another content than its digest says.")
        return found

    def blob(self, repository: str, digest: str) -> Bytes:
        """A stream of a blob's bytes."""
        url, headers = f"{self.url}/{repository}/blobs/{digest}", {}
        if self.authorization:
            headers["Authorization"] = self.authorization
        try:
            answer = self.client.send(self.client.build_request("GET", url, headers=headers), stream=True)
        except httpx.HTTPError as error:
            raise OperatorError(f"{self.name} does not answer: {error}") from None
        if answer.status_code != 200:
            answer.close()
            raise OperatorError(f"{self.name} answered {answer.status_code} for {repository}@{digest}.")
        return _Stream(answer.iter_bytes(BLOCK))

    def has(self, repository: str, digest: str) -> bool:
        """Whether it holds a blob."""
        return self._ask("HEAD", f"{self.url}/{repository}/blobs/{digest}", "pull,push", repository, (200, 404)).status_code == 200

    def push_blob(self, repository: str, digest: str, size: int, content: Bytes) -> None:
        place = self._ask("POST", f"{self.url}/{repository}/blobs/uploads/", "pull,push", repository, (202,)).headers["Location"]
        url = httpx.URL(f"{self.url}/").join(place).copy_merge_params({"digest": digest})
        self._ask("PUT", str(url), "pull,push", repository, (201,), content=iter(lambda: content.read(BLOCK), b""),
                  headers={"Content-Length": str(size), "Content-Type": "application/octet-stream"})

    def push_manifest(self, repository: str, version: str, document: Document) -> None:
        self._ask("PUT", f"{self.url}/{repository}/manifests/{version}", "pull,push", repository, (201,), content=document.data,
                  headers={"Content-Type": document.media_type})


class _Stream:
    """Chunks as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left = chunks, b""

    def read(self, size: int = -1, /) -> bytes:
        while size < 0 or len(self._left) < size:
            part = next(self._chunks, b"")
            if not part:
                break
            self._left += part
        found, self._left = (self._left, b"") if size < 0 else (self._left[:size], self._left[size:])
        return found


class Source(Protocol):
    """Something that images are read from."""

    def manifest(self, repository: str, version: str) -> Document: ...
    def blob(self, repository: str, digest: str) -> Bytes: ...


def parts(source: Source, repository: str, version: str) -> tuple[list[Document], list[dict[str, Any]]]:
    """An image's documents (what they name before themselves; the image's own is the last) and the descriptors of its blobs."""
    top = source.manifest(repository, version)
    if top.media_type in INDEXES:
        documents, blobs = [], []
        for child in top.value["manifests"]:
            inner, more = parts(source, repository, child["digest"])
            documents += inner
            blobs += more
    else:
        documents, blobs = [], [top.value["config"], *top.value["layers"]]
    return [*documents, top], list({b["digest"]: b for b in blobs}.values())


class Checked:
    """Reads a blob and compares it with its descriptor at its end."""

    def __init__(self, content: Bytes, descriptor: dict[str, Any]) -> None:
        self._content, self._descriptor = content, descriptor
        self._hash, self._size = hashlib.sha256(), 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._content.read(size)
        self._hash.update(data)
        self._size += len(data)
        return data

    def check(self) -> None:
        """Raises OperatorError if the bytes read are not the descriptor's."""
        if (self._size, f"sha256:{self._hash.hexdigest()}") != (self._descriptor["size"], self._descriptor["digest"]):
            raise OperatorError(f"The blob {self._descriptor['digest']} is damaged ({self._size} bytes came).")


def blob_name(digest: str) -> str:
    """Place of a blob in a layout."""
    return f"oci/blobs/{digest.replace(':', '/')}"


class Layout:
    """An OCI image layout below `oci/` in an uncompressed tar file, read."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self.tar, self.name = tar, str(tar.name)
        self.members = {m.name: m for m in tar.getmembers()}

    def read(self, name: str) -> bytes:
        """A small file of the archive. Raises OperatorError if it is missing."""
        member = self.members.get(name)
        file = self.tar.extractfile(member) if member else None
        if file is None:
            raise OperatorError(f"{name} is missing in {self.name}: the archive is not whole.")
        return file.read()

    def manifest(self, repository: str, version: str) -> Document:
        data = self.read(blob_name(version))
        if digest_of(data) != version:
            raise OperatorError(f"{version} in {self.name} is damaged.")
        value = json.loads(data)
        return Document(data, value.get("mediaType") or (INDEXES[0] if "manifests" in value else MANIFESTS[0]))

    def blob(self, repository: str, digest: str) -> Bytes:
        file = self.tar.extractfile(self.members[blob_name(digest)]) if blob_name(digest) in self.members else None
        if file is None:
            raise OperatorError(f"{digest} is missing in {self.name}: the archive is not whole.")
        return file
