"""What is in an image: a CycloneDX document of its Debian and Python packages, read from its layers.

Debian packages are those of dpkg's status; Python packages those that are installed, with the hashes that the part's uv.lock pins them by.
Programs that were compiled into the image (Go) are listed by their file.
"""

from __future__ import annotations

import json
import re
import tarfile
import tomllib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from tools.errors import OperatorError
from tools.oci import Bytes

STATUS = re.compile(r"^var/lib/dpkg/status(\.d/[^/]+)?$")
METADATA = re.compile(r"(^|/)(site|dist)-packages/[^/]+\.dist-info/METADATA$")
PROGRAM = re.compile(r"^(usr/local/bin|usr/bin|bin)?/?[^/]+$")
RELEASE = "etc/os-release"


def open_layer(content: Bytes, media_type: str) -> tarfile.TarFile:
    """A layer as a stream. Raises OperatorError for a compression that is not known here."""
    if media_type.endswith("gzip"):
        return tarfile.open(fileobj=content, mode="r|gz")  # type: ignore[call-overload,no-any-return]
    if media_type.endswith(".tar"):
        return tarfile.open(fileobj=content, mode="r|")  # type: ignore[call-overload,no-any-return]
    raise OperatorError(f"A layer is compressed as {media_type}, which is not read here. Push it as tar or gzip.")


def files(layers: Sequence[tuple[Bytes, str]]) -> dict[str, bytes]:
    """The files that tell packages, as the last layer has them: path and content (of programs, the first bytes)."""
    found: dict[str, bytes] = {}
    for content, media_type in layers:
        with open_layer(content, media_type) as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                folder, _, last = name.rpartition("/")
                if last == ".wh..wh..opq":
                    found = {k: v for k, v in found.items() if not k.startswith(f"{folder}/")}
                elif last.startswith(".wh."):
                    gone = f"{folder}/{last[4:]}".lstrip("/")
                    found = {k: v for k, v in found.items() if k != gone and not k.startswith(f"{gone}/")}
                elif member.isfile() and (STATUS.search(name) or METADATA.search(name) or name in (RELEASE, "usr/lib/os-release")):
                    file = tar.extractfile(member)
                    found[name] = file.read() if file else b""
                elif member.isfile() and member.mode & 0o111 and member.size > 1_000_000 and PROGRAM.search(name):
                    file = tar.extractfile(member)
                    head = file.read(65536) if file else b""
                    if b"Go build ID:" in head or b"\xff Go buildinf:" in head:
                        found[name] = b""
    return found


def debian(text: str) -> Iterator[dict[str, str]]:
    """Installed packages of dpkg's status."""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", paragraph, re.MULTILINE))
        if "Package" in fields and "installed" in fields.get("Status", "install ok installed").split():
            yield fields


def lock_hashes(locks: Sequence[Path]) -> dict[tuple[str, str], list[str]]:
    """sha256 of wheels and sources by (name, version), from uv.lock files."""
    found: dict[tuple[str, str], list[str]] = {}
    for lock in locks:
        for package in tomllib.loads(lock.read_text(encoding="utf-8")).get("package", []):
            files_ = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
            hashes = sorted({f["hash"].removeprefix("sha256:") for f in files_ if f.get("hash", "").startswith("sha256:")})
            found[(normal(package["name"]), package.get("version", ""))] = hashes
    return found


def normal(name: str) -> str:
    """A Python package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def licences(head: Message) -> list[dict[str, Any]]:
    """A Python package's licences in CycloneDX's form: its SPDX expression, else its classifiers, else the first line of its own words."""
    if expression := head.get("License-Expression"):
        return [{"expression": str(expression)}]
    classifiers = [c.rpartition(" :: ")[2] for c in map(str, head.get_all("Classifier", [])) if c.startswith("License :: ")]
    names = [c for c in classifiers if c not in ("OSI Approved", "DFSG approved")]
    own = (str(head.get("License") or "").strip().splitlines() or [""])[0]
    return [{"license": {"name": name}} for name in names or ([own] if own and own != "UNKNOWN" else [])]


def components(found: Mapping[str, bytes], hashes: Mapping[tuple[str, str], list[str]]) -> list[dict[str, Any]]:
    """CycloneDX components, sorted by their package URL."""
    release = found.get(RELEASE) or found.get("usr/lib/os-release") or b""
    os_fields = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', release.decode(errors="replace"), re.MULTILINE))
    distribution = os_fields.get("ID", "debian")
    suffix = f"&distro={distribution}-{os_fields['VERSION_ID']}" if "VERSION_ID" in os_fields else ""
    made: dict[str, dict[str, Any]] = {}

    def add(name: str, version: str, purl: str, **more: Any) -> None:
        made[purl] = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl, **more}

    for path, content in found.items():
        if STATUS.search(path):
            for fields in debian(content.decode(errors="replace")):
                version = fields.get("Version", "")
                quoted = version.replace("+", "%2B").replace(":", "%3A")
                add(fields["Package"], version, f"pkg:deb/{distribution}/{fields['Package']}@{quoted}"
                    f"?arch={fields.get('Architecture', 'all')}{suffix}")
        elif METADATA.search(path):
            head = HeaderParser().parsestr(content.decode(errors="replace"))
            name, version = normal(head["Name"]), head["Version"]
            known = hashes.get((name, version), [])
            more: dict[str, Any] = {"licenses": licences(head)} if licences(head) else {}
            if known:  # whichever of them was installed: all that the lock allows
                more["externalReferences"] = [{"type": "distribution", "url": f"https://pypi.org/project/{name}/{version}/",
                                               "hashes": [{"alg": "SHA-256", "content": h} for h in known]}]
            add(name, version, f"pkg:pypi/{name}@{version.replace('+', '%2B')}", **more)
        elif path not in (RELEASE, "usr/lib/os-release"):
            made[f"file:{path}"] = {"type": "application", "bom-ref": f"file:{path}", "name": path.rpartition("/")[2],
                                    "properties": [{"name": "llm-finetune:path", "value": f"/{path}"}]}
    return [made[key] for key in sorted(made)]


def document(name: str, reference: str, digest: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole CycloneDX document of an image; the same image gives the same document."""
    purl = f"pkg:oci/{name}@{digest.replace(':', '%3A')}?repository_url={reference.partition('@')[0]}"
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
            "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest)}",
            "metadata": {"component": {"type": "container", "bom-ref": purl, "name": name, "version": digest, "purl": purl}},
            "components": parts}


def text(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
