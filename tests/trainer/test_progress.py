"""progress.json, its lines, and its way to the RayJob."""

import errno
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from trainer.train import metrics, progress
from trainer.train.metrics import MetricsFile
from trainer.train.progress import Annotations, Follower, Progress


def test_fields_and_throttling(tmp_path):
    path = tmp_path / "progress.json"
    p = Progress(path, every_s=3600)
    p.update("train", 50.0, step=1, steps=2, loss=1.5, tokens_per_second=10.0, eta_seconds=7.0)
    first = json.loads(path.read_text())
    assert {"stage", "percent", "step", "steps", "tokens_per_second", "eta_seconds", "loss", "message", "updated"} == first.keys()
    p.update("train", 60.0, step=2)
    assert json.loads(path.read_text()) == first  # too soon
    p.update("export", 120.0)
    assert json.loads(path.read_text())["percent"] == 100.0


def test_full_storage_costs_progress_only(tmp_path, monkeypatch, caplog):
    def full(*_a):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(progress, "write_json", full)
    Progress(tmp_path / "progress.json").update("train", 1.0)
    assert "No space left" in caplog.text


def test_line():
    text = progress.line({"stage": "train", "percent": 37.2, "step": 12, "steps": 40, "loss": 2.10349, "tokens_per_second": 1234.4,
                          "eta_seconds": 80, "message": ""})
    assert text == "train 37%, step 12/40, loss 2.1035, 1234 tokens/s, 1m20s left"
    assert [progress.duration(s) for s in (0, 59.6, 61, 3725)] == ["0s", "1m00s", "1m01s", "1h02m"]


def test_follower_prints_changes(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAYJOB_NAME", raising=False)
    path = tmp_path / "progress.json"
    p = Progress(path)
    with Follower(path, every_s=0.0):
        p.update("prepare", 0.0, "reading")
        threading.Event().wait(1.6)
        p.update("done", 100.0)
    out = capsys.readouterr().out
    assert "prepare 0%, reading" in out and "done 100%" in out


@pytest.fixture
def api(monkeypatch):
    """A Kubernetes API that stores what is patched, or answers with a status."""
    seen, status = [], {"code": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_PATCH(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers["Content-Type"], body))
            self.send_response(status["code"])
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from kubernetes import client, config

    def load():
        settings = client.Configuration()
        settings.host = f"http://127.0.0.1:{server.server_port}"
        client.Configuration.set_default(settings)

    monkeypatch.setattr(config, "load_incluster_config", load)
    yield seen, status
    server.shutdown()
    client.Configuration.set_default(None)


def test_annotation_is_patched_and_only_when_it_changes(api):
    seen, _ = api
    annotations = Annotations("run-1", "finetune", every_s=0.0)
    assert annotations.put("train 1%") and annotations.put("train 1%") and annotations.put("train 2%")
    assert [body["metadata"]["annotations"][progress.ANNOTATION] for _, _, body in seen] == ["train 1%", "train 2%"]
    assert seen[0][0] == "/apis/ray.io/v1/namespaces/finetune/rayjobs/run-1" and "merge-patch" in seen[0][1]


def test_refusal_is_said_once_and_ends_the_mirror(api, capsys):
    _, status = api
    status["code"] = 403
    assert Annotations("run-1", "finetune", 0.0).put("x") is False
    assert "not mirrored to RayJob finetune/run-1: 403" in capsys.readouterr().out


def test_no_service_account_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RAYJOB_NAME", "run-1")
    monkeypatch.setattr(progress, "SERVICE_ACCOUNT", tmp_path)
    assert Annotations.from_environment(1.0) is None and "no service account" in capsys.readouterr().out
    monkeypatch.delenv("RAYJOB_NAME")
    assert Annotations.from_environment(1.0) is None


def test_metrics_lines_survive_a_full_storage(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append({"step": 1, "loss": 1.0})
    real = file._file

    class Torn:
        """Takes five bytes of a line, then has no room."""

        written = 0

        def write(self, data):
            self.written += 1
            if self.written > 1:
                raise OSError(errno.ENOSPC, "full")
            return real.write(data[:5])

        def fileno(self):
            return real.fileno()

    file._file = Torn()
    file.append({"step": 2, "loss": float("nan")})
    assert metrics.read(path) == [{"step": 1, "loss": 1.0}] and path.read_bytes().endswith(b"\n")
    file._file = real
    file.append({"step": 3, "loss": 3.0})
    file.close()
    assert metrics.read(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 3.0}]
    assert os.path.getsize(path) == len(path.read_bytes())
