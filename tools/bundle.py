"""One archive with all that an environment runs, for sites without internet, and its way into their registry.

    make bundle ENV=dev                                          llm-finetune-0.1.0-dev.tar
    make bundle-load BUNDLE=llm-finetune-0.1.0-dev.tar REGISTRY=registry.site.example/ml

The archive holds the packaged chart (charts/), the images as they are in their registries (oci/, an OCI image layout), a CycloneDX
document for each image (sbom/), and bundle.json: names, references and digests. Images keep their digests, so runs keep their names.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from tools import charts, diff, environments, oci, sbom
from tools.cluster.settings import Settings
from tools.errors import OperatorError
from tools.layout import REPOSITORY
from tools.oci import INDEXES, Checked, Document, Reference, Registry

Say = Callable[[str], None]
FORMAT = 1
INDEX = "bundle.json"
LOCKS = [REPOSITORY / part / "uv.lock" for part in ("trainer", "chatbot")]


@dataclass(frozen=True)
class Item:
    """One image of a bundle."""

    key: str
    """Below global.images."""
    reference: Reference

    @property
    def name(self) -> str:
        """What it is called below a registry's path."""
        return self.reference.repository.rpartition("/")[2]


def needed(environment: environments.Environment, images: Mapping[str, Any]) -> list[Item]:
    """The images that the environment's objects name. Raises OperatorError for one that is not under global.images."""
    objects = diff.render(environment.name, images=images)
    values = environments.merge(environments.chart_values(), environment.values)
    if images and "images" not in (environment.documents["release.yaml"].value or {}).get("global", {}):
        values = environments.merge(values, {"global": {"images": dict(images)}})
    known = {}
    for key, image in values["global"]["images"].items():
        known[f"{image['repository']}@{image['digest']}" if image.get("digest") else f"{image['repository']}:{image['tag']}"] = key
    used = set(_images(list(objects.values())))
    if unknown := sorted(used - set(known)):
        raise OperatorError(f"{', '.join(unknown)} is used but not under global.images, so it cannot be renamed at the other site.")
    return [Item(known[text], Reference.parse(text)) for text in sorted(used)]


def _images(node: Any) -> list[str]:
    """Values of `image` of all containers."""
    if isinstance(node, dict):
        own = [node["image"]] if isinstance(node.get("image"), str) and "name" in node else []
        return own + [i for value in node.values() for i in _images(value)]
    return [i for value in node for i in _images(value)] if isinstance(node, list) else []


class Writer:
    """An archive that has its name only when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        self.tar = self._open("w")
        self.names: set[str] = set()

    def add(self, name: str, content: bytes | oci.Bytes, size: int = 0) -> None:
        """Add a file once; owner and time are the same in every bundle."""
        if name in self.names:
            return
        self.names.add(name)
        info = tarfile.TarInfo(name)
        info.size = len(content) if isinstance(content, bytes) else size
        self.tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else content)

    def _open(self, mode: Literal["w", "a"]) -> tarfile.TarFile:
        return tarfile.open(self.partial, mode, format=tarfile.PAX_FORMAT)

    def append(self) -> None:
        """Go on after the archive was closed to be read."""
        self.tar = self._open("a")

    def close(self) -> None:
        self.tar.close()
        os.replace(self.partial, self.path)

    def drop(self) -> None:
        self.tar.close()
        self.partial.unlink(missing_ok=True)


def add_image(writer: Writer, source: oci.Source, item: Item, say: Say) -> Document:
    """Copy an image into the layout; returns its manifest or index."""
    documents, blobs = oci.parts(source, item.reference.repository, item.reference.version)
    for descriptor in blobs:
        if oci.blob_name(descriptor["digest"]) in writer.names:
            continue
        say(f"{item.name}: {descriptor['size'] / 1e6:,.1f} MB")
        content = Checked(source.blob(item.reference.repository, descriptor["digest"]), descriptor)
        writer.add(oci.blob_name(descriptor["digest"]), content, descriptor["size"])
        content.check()
    for document in documents:
        writer.add(oci.blob_name(document.digest), document.data)
    return documents[-1]


def bill(archive: tarfile.TarFile, item: Item, top: Document, hashes: Mapping[tuple[str, str], list[str]]) -> dict[str, Any]:
    """The CycloneDX document of an image of an archive (of an index: of its first platform)."""
    layout = oci.Layout(archive)
    manifest = top
    while manifest.media_type in INDEXES:
        manifest = layout.manifest("", manifest.value["manifests"][0]["digest"])
    layers = [(layout.blob("", layer["digest"]), layer["mediaType"]) for layer in manifest.value["layers"]]
    return sbom.document(item.name, str(item.reference), top.digest, sbom.components(sbom.files(layers), hashes))


def make(path: Path, items: list[Item], chart: Path, source: Callable[[str], oci.Source], environment: str, say: Say) -> dict[str, Any]:
    """Write the archive; returns its index. `source`: images' registry by its name; `chart`: the packaged chart."""
    writer, tops = Writer(path), []
    try:
        for item in items:
            say(f"{item.name} from {item.reference}")
            tops.append(add_image(writer, source(item.reference.registry), item, say))
        writer.add("oci/oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
        index = {"schemaVersion": 2, "mediaType": INDEXES[0], "manifests": [
            {**top.descriptor, "annotations": {"org.opencontainers.image.ref.name": item.name}}
            for item, top in zip(items, tops, strict=True)]}
        writer.add("oci/index.json", json.dumps(index, indent=1).encode())
        writer.add(f"charts/{chart.name}", chart.read_bytes())
        listed = {"format": FORMAT, "environment": environment, "chart": {"file": f"charts/{chart.name}",
                                                                         "sha256": oci.digest_of(chart.read_bytes())},
                  "images": [{"key": item.key, "name": item.name, "reference": str(item.reference), "digest": top.digest,
                              "sbom": f"sbom/{item.name}.cdx.json"} for item, top in zip(items, tops, strict=True)]}
        writer.add(INDEX, (json.dumps(listed, indent=1) + "\n").encode())
        writer.tar.close()
        hashes, bills = sbom.lock_hashes(LOCKS), []
        with tarfile.open(writer.partial) as written:
            for item, top in zip(items, tops, strict=True):
                say(f"{item.name}: packages")
                bills.append((f"sbom/{item.name}.cdx.json", sbom.text(bill(written, item, top, hashes))))
        writer.append()
        for name, content in bills:
            writer.add(name, content)
        writer.close()
    except BaseException:
        writer.drop()
        raise
    return listed


def load(path: Path, registry: str, say: Say, plain_http: bool = False) -> dict[str, Any]:
    """Bring an archive's images and chart into a registry (`host[:port]/path`); returns Helm values that name them there.

    What the registry has already is not sent again. Raises OperatorError for an archive that is not whole.
    """
    host, _, prefix = registry.strip("/").partition("/")
    target = Registry(host, plain_http)
    images: dict[str, Any] = {}
    with tarfile.open(path, "r:") as tar:
        layout = oci.Layout(tar)
        listed = json.loads(layout.read(INDEX))
        if listed.get("format") != FORMAT:
            raise OperatorError(f"{path} has format {listed.get('format')}; this program reads {FORMAT}. Load it with the version that "
                                "made it.")
        chart = layout.read(listed["chart"]["file"])
        if oci.digest_of(chart) != listed["chart"]["sha256"]:
            raise OperatorError(f"{listed['chart']['file']} in {path} is damaged.")
        for image in listed["images"]:
            repository = f"{prefix}/{image['name']}".lstrip("/")
            documents, blobs = oci.parts(layout, repository, image["digest"])
            for descriptor in blobs:
                if target.has(repository, descriptor["digest"]):
                    continue
                say(f"{image['name']}: {descriptor['size'] / 1e6:,.1f} MB")
                content = Checked(layout.blob(repository, descriptor["digest"]), descriptor)
                try:
                    target.push_blob(repository, descriptor["digest"], descriptor["size"], content)
                except OperatorError:
                    content.check()  # a registry refuses damaged bytes in its own words
                    raise
            for document in documents:
                target.push_manifest(repository, document.digest, document)
            tag = image["reference"].rpartition(":")[2] if "@" not in image["reference"] else "bundle"
            target.push_manifest(repository, tag, documents[-1])
            say(f"{host}/{repository}@{image['digest']}")
            images[image["key"]] = {"repository": f"{host}/{repository}", "digest": image["digest"]}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(listed["chart"]["file"]).name
        file.write_bytes(chart)
        say(charts.push(f"{registry.strip('/')}/charts", file, plain_http))
    return {"global": {"images": images}}


def main_make(arguments: argparse.Namespace) -> int:
    """`bundle ENV`."""
    environment = environments.load(arguments.environment)
    cluster = None if "images" in (environment.documents["release.yaml"].value or {}).get("global", {}) else diff.connect()
    items = needed(environment, cluster.images(environment.name) if cluster else {})
    local = Settings().registry
    with tempfile.TemporaryDirectory() as folder:
        chart = charts.package(environment.chart_version, Path(folder))
        path = Path(arguments.out or f"llm-finetune-{environment.chart_version}-{environment.name}.tar")
        listed = make(path, items, chart, lambda name: Registry(name, arguments.plain_http or name == local), environment.name, print)
    for image in listed["images"]:
        print(f"{image['name']:24} {image['digest']}")
    print(f"{path}: {path.stat().st_size / 1e9:,.2f} GB")
    return 0


def main_load(arguments: argparse.Namespace) -> int:
    """`bundle-load FILE --registry HOST/PATH`."""
    path = Path(arguments.file)
    if not path.is_file():
        raise OperatorError(f"{path} is not a file. Give BUNDLE=archive, as `make bundle` wrote it.")
    if not arguments.registry:
        raise OperatorError("Give REGISTRY=host/path, for example: make bundle-load BUNDLE=x.tar REGISTRY=registry.example.com/ml")
    values = load(path, arguments.registry, print, arguments.plain_http)
    print("\n# Repositories belong into environments/<env>/site.yaml, digests into release.yaml.")
    print(yaml.safe_dump(values, sort_keys=False), end="")
    return 0


def add_parser(commands: Any) -> None:
    """`bundle` and `bundle-load`; OUT, BUNDLE, REGISTRY and PLAIN_HTTP also from the environment, as make passes them."""
    env = os.environ.get
    for name, text, run in (("bundle", "one archive with all that an environment runs", main_make),
                            ("bundle-load", "bring an archive into a registry", main_load)):
        parser: argparse.ArgumentParser = commands.add_parser(name, help=text)
        parser.add_argument("--plain-http", action="store_true", default=env("PLAIN_HTTP", "") == "1", help="the registry has no TLS")
        if name == "bundle":
            parser.add_argument("environment")
            parser.add_argument("--out", default=env("OUT", ""), help="the archive (default: llm-finetune-<version>-<env>.tar)")
        else:
            parser.add_argument("file")
            parser.add_argument("--registry", default=env("REGISTRY", ""), help="host[:port]/path")
        parser.set_defaults(run=run)
