"""The device plugin's configuration against the structures of its own source: it passes over in silence what it does not know."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.conftest import GPU, Values, join, one, render
from tools import charts, shell

MODULE = "github.com/NVIDIA/k8s-device-plugin"
PLUGIN: Values = join(GPU, {"nvidia-device-plugin": {"enabled": True, "namespace": "gpu"}})


@cache
def source() -> Path:
    """The module at the chart's version."""
    chart = yaml.safe_load((charts.CHART / "charts/nvidia-device-plugin/Chart.yaml").read_text(encoding="utf-8"))
    return Path(json.loads(shell.output(["go", "mod", "download", "-json", f"{MODULE}@v{chart['appVersion']}"], timeout=600))["Dir"])


@cache
def structures() -> dict[str, dict[str, str]]:
    """Go's structures of the configuration: name, then key and type of each field; embedded structures are joined in."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((source() / "api/config/v1").glob("*.go")))
    bodies = dict(re.findall(r"^type (\w+) struct \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    found = {name: {key: re.sub(r"[*\[\]]", "", kind) for kind, key in re.findall(r'^\s+\w+\s+(\S+)\s+`json:"(\w+)', body, re.MULTILINE)}
             for name, body in bodies.items()}
    for name, body in bodies.items():
        for embedded in re.findall(r"^\s+(\w+)$", body, re.MULTILINE):
            found[name] |= found.get(embedded, {})
    return found


def unknown(value: Any, structure: str, where: str = "") -> list[str]:
    """Keys that the plugin does not know."""
    if isinstance(value, list):
        return [key for item in value for key in unknown(item, structure, where)]
    fields = structures().get(structure)
    if fields is None or not isinstance(value, dict):
        return []
    found = [f"{where}{key}" for key in value if key not in fields]
    return found + [key for name, inner in value.items() if name in fields for key in unknown(inner, fields[name], f"{where}{name}.")]


@pytest.mark.parametrize("values", [
    {}, {"migStrategy": "mixed"}, {"sharing": {"kind": "timeSlicing", "rename": False, "replicas": 4}},
    {"sharing": {"kind": "mps", "rename": False}}, {"driverRoot": "/run/nvidia/driver", "failOnInitError": True}])
def test_the_plugin_knows_every_key(values: Values) -> None:
    config = one(render(join(PLUGIN, {"nvidia-device-plugin": values})), "ConfigMap", "site-nvidia-device-plugin")["data"]["config.yaml"]
    assert unknown(yaml.safe_load(config), "Config") == []


def test_an_unknown_key_is_found() -> None:
    assert unknown({"version": "v1", "flags": {"migStrategie": "none", "plugin": {"deviceListStrategies": []}}}, "Config") == [
        "flags.migStrategie", "flags.plugin.deviceListStrategies"]
    assert unknown({"sharing": {"timeSlicing": {"resources": [{"name": "nvidia.com/gpu", "replica": 2}]}}}, "Config") == [
        "sharing.timeSlicing.resources.replica"]


def test_the_programs_read_the_variables() -> None:
    """Environment variables of the containers are flags of the three programs, or the container runtime's."""
    text = "\n".join(path.read_text(encoding="utf-8") for folder in ("cmd", "internal/flags") for path in (source() / folder).rglob("*.go"))
    read = set(re.findall(r'"([A-Z][A-Z0-9_]+)"', text))
    runtime = {"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_MIG_MONITOR_DEVICES"}
    manifests = render(join(PLUGIN, {"nvidia-device-plugin": {"sharing": {"kind": "mps", "rename": False}}}))
    for daemon in (m for m in manifests if m["kind"] == "DaemonSet"):
        for container in daemon["spec"]["template"]["spec"]["containers"]:
            assert {variable["name"] for variable in container["env"]} <= read | runtime, container["name"]
