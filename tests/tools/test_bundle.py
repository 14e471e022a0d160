"""An environment's archive: made from a registry, loaded elsewhere with the same digests, refused when damaged; what is in images."""

from __future__ import annotations

import base64
import gzip
import io
import json
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.tools.conftest import free_port
from tests.tools.test_golden import IMAGES
from tools import bundle, charts, environments, oci, sbom
from tools.errors import OperatorError
from tools.oci import Document, Reference, Registry

STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u10
Description: GNU C Library
 long text

Package: gone
Status: deinstall ok config-files
Architecture: all
Version: 1
"""


def layer(files: dict[str, bytes], mode: int = 0o644) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


LAYERS = [
    (layer({"var/lib/dpkg/status": STATUS.encode(), "usr/lib/os-release": b'ID=debian\nVERSION_ID="12"\n',
            "opt/venv/lib/python3.11/site-packages/Old_Thing-1.0.dist-info/METADATA": b"Name: Old_Thing\nVersion: 1.0\n\n"}),
     "application/vnd.oci.image.layer.v1.tar"),
    (gzip.compress(layer({
        "opt/venv/lib/python3.11/site-packages/PyYAML-6.0.3.dist-info/METADATA":
            b"Name: PyYAML\nVersion: 6.0.3\nLicense-Expression: MIT\n\n",
        "opt/venv/lib/python3.11/site-packages/.wh.Old_Thing-1.0.dist-info": b""})), "application/vnd.oci.image.layer.v1.tar+gzip"),
    (layer({"manager": b"\x7fELF" + b"Go build ID: x" + bytes(1_100_000)}, 0o755), "application/vnd.oci.image.layer.v1.tar"),
]


def push(host: str, repository: str, tag: str, architectures: tuple[str, ...] = ("amd64",)) -> str:
    """A small image (an index if it is for several architectures); its digest."""
    there = Registry(host, plain_http=True)
    made = []
    for architecture in architectures:
        config = json.dumps({"architecture": architecture, "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}).encode()
        described = []
        for data, kind in [(config, "application/vnd.oci.image.config.v1+json"), *LAYERS]:
            there.push_blob(repository, oci.digest_of(data), len(data), io.BytesIO(data))
            described.append({"mediaType": kind, "digest": oci.digest_of(data), "size": len(data)})
        manifest = {"schemaVersion": 2, "mediaType": oci.MANIFESTS[0], "config": described[0], "layers": described[1:]}
        made.append(Document(json.dumps(manifest).encode(), oci.MANIFESTS[0]))
        there.push_manifest(repository, made[-1].digest, made[-1])
    top = made[0]
    if len(made) > 1:
        top = Document(json.dumps({"schemaVersion": 2, "mediaType": oci.INDEXES[0], "manifests": [
            {**m.descriptor, "platform": {"os": "linux", "architecture": a}} for m, a in zip(made, architectures, strict=True)]}).encode(),
            oci.INDEXES[0])
    there.push_manifest(repository, tag, top)
    return top.digest


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return charts.package("0.1.0", tmp_path_factory.mktemp("chart"))


@pytest.fixture(scope="module")
def archive(node: str, chart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    trainer = push(node, "one/trainer", "local")
    push(node, "one/operator", "v1", ("amd64", "arm64"))
    items = [bundle.Item("trainer", Reference.parse(f"{node}/one/trainer@{trainer}")),
             bundle.Item("kuberayOperator", Reference.parse(f"{node}/one/operator:v1"))]
    path = tmp_path_factory.mktemp("bundle") / "all.tar"
    bundle.make(path, items, chart, lambda name: Registry(name, plain_http=True), "dev", lambda _: None)
    return path


def test_the_archive_is_an_oci_layout_with_everything(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names, layout = tar.getnames(), oci.Layout(tar)
        assert len(names) == len(set(names))
        listed = json.loads(layout.read("bundle.json"))
        assert json.loads(layout.read("oci/oci-layout")) == {"imageLayoutVersion": "1.0.0"}
        index = json.loads(layout.read("oci/index.json"))
        assert [m["digest"] for m in index["manifests"]] == [i["digest"] for i in listed["images"]]
        for name in names:
            if name.startswith("oci/blobs/"):
                assert oci.blob_name(oci.digest_of(layout.read(name))) == name
        for image in listed["images"]:
            bill = json.loads(layout.read(image["sbom"]))
            assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
            assert bill["metadata"]["component"]["version"] == image["digest"]
            found = {c["purl"]: c for c in bill["components"] if "purl" in c}
            assert set(found) == {"pkg:deb/debian/libc6@2.36-9%2Bdeb12u10?arch=amd64&distro=debian-12", "pkg:pypi/pyyaml@6.0.3"}
            yaml = found["pkg:pypi/pyyaml@6.0.3"]
            assert yaml["licenses"] == [{"expression": "MIT"}]
            assert all(len(h["content"]) == 64 for h in yaml["externalReferences"][0]["hashes"]), "as uv.lock has it"
            assert [c["name"] for c in bill["components"] if c["type"] == "application"] == ["manager"]
            assert len({c["bom-ref"] for c in bill["components"]}) == len(bill["components"])


def test_loading_keeps_every_digest(archive: Path, node: str) -> None:
    values = bundle.load(archive, f"{node}/two/ml", lambda _: None, plain_http=True)["global"]["images"]
    there = Registry(node, plain_http=True)
    for key, name, old in (("trainer", "trainer", "one/trainer"), ("kuberayOperator", "operator", "one/operator")):
        assert values[key]["repository"] == f"{node}/two/ml/{name}"
        documents, blobs = oci.parts(there, f"two/ml/{name}", values[key]["digest"])
        assert documents == oci.parts(there, old, values[key]["digest"])[0]
        for blob in blobs:
            content = oci.Checked(there.blob(f"two/ml/{name}", blob["digest"]), blob)
            content.read()
            content.check()
    assert there.manifest("two/ml/operator", "v1").digest == values["kuberayOperator"]["digest"]
    assert there.manifest("two/ml/charts/llm-finetune", "0.1.0").value["config"]["mediaType"].startswith("application/vnd.cncf.helm")


def test_loading_again_sends_no_blob(archive: Path, node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle.load(archive, f"{node}/three", lambda _: None, plain_http=True)
    monkeypatch.setattr(Registry, "push_blob", lambda *_: pytest.fail("sent again"))
    bundle.load(archive, f"{node}/three", lambda _: None, plain_http=True)


def test_the_same_images_make_the_same_archive(archive: Path, node: str, chart: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as tar:
        items = [bundle.Item(i["key"], Reference.parse(i["reference"])) for i in json.loads(oci.Layout(tar).read("bundle.json"))["images"]]
    bundle.make(tmp_path / "again.tar", items, chart, lambda name: Registry(name, plain_http=True), "dev", lambda _: None)
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()


@pytest.mark.parametrize(("part", "says"), [("oci/blobs/sha256/", "damaged"), ("charts/", "is damaged"), ("bundle.json", "format 9")])
def test_a_damaged_archive_is_refused(archive: Path, node: str, tmp_path: Path, part: str, says: str) -> None:
    path = tmp_path / "damaged.tar"
    path.write_bytes(archive.read_bytes())
    with tarfile.open(path) as tar:
        member = max((m for m in tar.getmembers() if m.name.startswith(part)), key=lambda m: m.size)
    with open(path, "r+b") as file:
        file.seek(member.offset_data)
        if part == "bundle.json":
            file.write(b'{\n "format": 9')
        else:
            file.seek(member.offset_data + member.size // 2)
            file.write(b"!!!!")
    with pytest.raises(OperatorError, match=says):
        bundle.load(path, f"{node}/damaged-{part.strip('/').replace('/', '-').replace('.', '-')}", lambda _: None, plain_http=True)


def test_a_blob_that_is_missing_is_refused(archive: Path, node: str, tmp_path: Path) -> None:
    path = tmp_path / "short.tar"
    with tarfile.open(archive) as old, tarfile.open(path, "w") as new:
        for member in [m for m in old.getmembers() if m.size < 1_000_000]:
            new.addfile(member, old.extractfile(member))
    with pytest.raises(OperatorError, match="not whole"):
        bundle.load(path, f"{node}/short", lambda _: None, plain_http=True)


def test_an_interrupted_bundle_leaves_no_archive(node: str, chart: Path, tmp_path: Path) -> None:
    push(node, "one/trainer", "local")
    item = bundle.Item("trainer", Reference.parse(f"{node}/one/trainer:local"))

    def interrupted(text: str) -> None:
        if "packages" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundle.make(tmp_path / "x.tar", [item], chart, lambda name: Registry(name, plain_http=True), "dev", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_sends_other_bytes_is_refused(chart: Path, tmp_path: Path) -> None:
    class Lying:
        def manifest(self, *_: str) -> Document:
            layers = [{"mediaType": "x.tar", "digest": "sha256:" + "0" * 64, "size": 3}]
            return Document(json.dumps({"config": layers[0], "layers": layers}).encode(), oci.MANIFESTS[0])

        def blob(self, *_: str) -> Any:
            return io.BytesIO(b"abc")

    item = bundle.Item("a", Reference("r.example", "a", "t"))
    with pytest.raises(OperatorError, match="damaged"):
        bundle.make(tmp_path / "x.tar", [item], chart, lambda _: Lying(), "dev", lambda _: None)


def test_what_an_environment_needs() -> None:
    """The images of its rendered objects, and no others."""
    found = {i.key: str(i.reference) for i in bundle.needed(environments.load("local"), IMAGES)}
    assert found == {k: f"{v['repository']}@{v['digest']}" for k, v in IMAGES.items()}
    assert {i.key for i in bundle.needed(environments.load("dev"), {})} == {"trainer", "kuberayOperator", "nvidiaDevicePlugin"}


@pytest.mark.parametrize("text", ["trainer:1", "registry.example.com/trainer", "library/trainer:1"])
def test_references_need_a_registry_and_a_version(text: str) -> None:
    with pytest.raises(OperatorError, match="not an image in a registry"):
        Reference.parse(text)


@pytest.mark.parametrize("text", ["r.example:5000/a/b:1", "localhost/a@sha256:" + "1" * 64])
def test_references(text: str) -> None:
    assert str(Reference.parse(text)) == text


def test_a_registry_that_wants_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """401 with a realm, a token for the password there, and the manifest with the token."""
    seen: list[tuple[str, str]] = []
    body = b'{"schemaVersion": 2}'

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = self.headers.get("Authorization", "")
            seen.append((self.path, given))
            if self.path.startswith("/token"):
                self.send_response(200 if given == "Basic " + base64.b64encode(b"robot:secret").decode() else 401)
                answer = b'{"token": "t"}'
            elif given != "Bearer t":
                self.send_response(401)
                self.send_header("WWW-Authenticate", f'Bearer realm="http://{self.headers["Host"]}/token",service="s"')
                answer = b""
            else:
                self.send_response(200)
                self.send_header("Content-Type", oci.MANIFESTS[0])
                answer = body
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            """Nothing on the test's output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    name = f"127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "auth.json").write_text(json.dumps({"auths": {name: {"auth": base64.b64encode(b"robot:wrong").decode()}}}))
    with pytest.raises(OperatorError, match="Log in with"):
        Registry(name, plain_http=True).manifest("a/b", "1")
    (tmp_path / "auth.json").write_text(json.dumps({"auths": {name: {"auth": base64.b64encode(b"robot:secret").decode()}}}))
    assert Registry(name, plain_http=True).manifest("a/b", "1").data == body
    assert any("scope=repository%3Aa%2Fb%3Apull" in path for path, _ in seen)
    server.shutdown()
    server.server_close()


def test_a_registry_that_is_not_there_is_said() -> None:
    with pytest.raises(OperatorError, match="PLAIN_HTTP"):
        Registry(f"127.0.0.1:{free_port()}").manifest("a", "1")


def test_compressions_that_are_not_read_are_said() -> None:
    with pytest.raises(OperatorError, match="zstd"):
        sbom.files([(io.BytesIO(b""), "application/vnd.oci.image.layer.v1.tar+zstd")])


def test_opaque_folders_hide_what_was_below() -> None:
    name = "usr/lib/python3/dist-packages/a-1.dist-info/METADATA"
    below, above = layer({name: b"Name: a\nVersion: 1\n\n"}), layer({"usr/lib/.wh..wh..opq": b""})
    kind = "application/vnd.oci.image.layer.v1.tar"
    assert list(sbom.files([(io.BytesIO(below), kind)])) == [name]
    assert sbom.files([(io.BytesIO(below), kind), (io.BytesIO(above), kind)]) == {}


def test_locks_are_read() -> None:
    hashes = sbom.lock_hashes(bundle.LOCKS)
    assert len(hashes) > 50 and any(name == "torch" and found for (name, _), found in hashes.items())
