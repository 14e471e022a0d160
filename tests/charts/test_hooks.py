"""`helm test`: what the hooks ask, run against servers that answer well and badly; nothing else of the release is a hook."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.charts.conftest import CHATBOT, JOB, Values, join, one, render

ALL = join(JOB, CHATBOT)


def hooks(values: Values) -> dict[str, Any]:
    return {m["metadata"]["name"]: m for m in render(values) if "helm.sh/hook" in m["metadata"].get("annotations", {})}


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """Answers each path with the status in `server.answers`, 404 without one."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert "Authorization" not in self.headers
            self.send_response(self.server.answers.get(self.path, 404))  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing on the test's output."""

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def ask(values: Values, name: str, address: str, server: Any, answers: dict[str, int]) -> int:
    """Exit code of a hook's program, its Service's address replaced by the server's."""
    command = [*hooks(values)[name]["spec"]["containers"][0]["command"], *hooks(values)[name]["spec"]["containers"][0]["args"]]
    assert address in command[-1]
    server.answers = answers
    port = server.server_address[1]
    return subprocess.run([sys.executable, *command[1:-1], command[-1].replace(address, f"http://127.0.0.1:{port}")],
                          capture_output=True, timeout=60, check=False).returncode


def test_hooks_are_tests_and_nothing_else() -> None:
    found = hooks(ALL)
    assert sorted(found) == ["site-chatbot-test", "site-ray-cluster-test"]
    assert {m["metadata"]["annotations"]["helm.sh/hook"] for m in found.values()} == {"test"}
    assert {m["kind"] for m in found.values()} == {"Pod"}
    assert sorted(hooks({})) == ["site-ray-cluster-test"]
    assert hooks({"global": {"rayCluster": {"standing": False}}}) == {}


@pytest.mark.parametrize(("mode", "answers", "passes"), [
    ("token", {"/": 200, "/api/jobs/": 401}, True),
    ("token", {"/": 200, "/api/jobs/": 200}, False),
    ("token", {"/": 200, "/api/jobs/": 500}, False),
    ("token", {"/": 503, "/api/jobs/": 401}, False),
    ("disabled", {"/": 200, "/api/jobs/": 200}, True),
    ("disabled", {"/": 200, "/api/jobs/": 401}, False),
])
def test_the_dashboard_refuses_without_token(server: Any, mode: str, answers: dict[str, int], passes: bool) -> None:
    values = {"ray-cluster": {"auth": {"mode": mode}}}
    assert (ask(values, "site-ray-cluster-test", "http://llm-finetune-dashboard:8265", server, answers) == 0) is passes


@pytest.mark.parametrize(("answers", "passes"), [
    ({"/healthz": 200, "/readyz": 200}, True), ({"/healthz": 200, "/readyz": 503}, False), ({"/readyz": 200}, False)])
def test_the_chatbot_is_ready(server: Any, answers: dict[str, int], passes: bool) -> None:
    assert (ask(CHATBOT, "site-chatbot-test", "http://site-chatbot:7860", server, answers) == 0) is passes


def test_the_addresses_are_services_and_the_policies_let_the_tests_through() -> None:
    manifests = render(ALL)
    for name, service in (("site-ray-cluster-test", "llm-finetune-dashboard"), ("site-chatbot-test", "site-chatbot")):
        port = one(manifests, "Service", service)["spec"]["ports"][0]["port"]
        assert f"http://{service}:{port}" in hooks(ALL)[name]["spec"]["containers"][0]["args"][0]
        labels = hooks(ALL)[name]["metadata"]["labels"]
        own = one(manifests, "NetworkPolicy", name)["spec"]
        assert own["podSelector"]["matchLabels"].items() <= labels.items()
        asked = one(manifests, "NetworkPolicy", name.removesuffix("-test"))["spec"]["ingress"]
        let = [peer["podSelector"]["matchLabels"] for rule in asked for peer in rule["from"]
               if "podSelector" in peer and "namespaceSelector" not in peer]
        assert any(selector.items() <= labels.items() for selector in let)
