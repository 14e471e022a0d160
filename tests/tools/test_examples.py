"""The worked examples (docs/examples): environments that render by the printed Helm command, and runs that fit the sites beside them.

tests/charts/test_objects.py holds their objects to the schemas of Kubernetes and KubeRay, tests/trainer/test_plan_docs.py the plans in
docs/examples.md to the command's output, tests/e2e/test_groups.py places the mixed ones on nodes.
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tools import diff, environments
from tools.layout import REPOSITORY
from trainer import config
from trainer.plan import plan, recipes
from trainer.plan.hardware import GIB, GPUS

EXAMPLES = environments.examples()
UNITS = {"Gi": 2**30, "Ti": 2**40}


def size(quantity: str) -> int:
    """Bytes of 640Gi."""
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def run_of(name: str) -> config.Config:
    return config.load(str(environments.load(name).folder / "finetune.yaml"))


def groups_of(name: str) -> list[dict[str, Any]]:
    """Worker groups of the rendered cluster: pods, GPUs and memory of a pod, product label."""
    (cluster,) = [m for (kind, *_), m in diff.render(name).items() if kind == "RayCluster"]
    found = []
    for group in cluster["spec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        found.append({"name": group["groupName"], "pods": group["replicas"], "gpus": limits["nvidia.com/gpu"],
                      "memory": size(limits["memory"]),
                      "product": group["template"]["spec"].get("nodeSelector", {}).get("nvidia.com/gpu.product")})
    return found


def test_every_kind_of_site_has_one() -> None:
    hardware = {recipes.hardware(plan(run_of(name), advise=False)) for name in EXAMPLES}
    assert hardware == {"12x A100-80GB and 4x H100-80GB on 4 nodes, 100 Gbit/s", "8x H100-80GB", "1x RTX-4090"}
    runs = {(run.model.name, run.method.kind, run.engine.offload) for run in (run_of(n).run for n in EXAMPLES if "mixed" in n)}
    assert runs == {("meta-llama/Llama-2-7b-hf", "full", "none"), ("meta-llama/Llama-2-13b-hf", "full", "none"),
                    ("meta-llama/Llama-2-70b-hf", "full", "cpu"), ("meta-llama/Llama-2-70b-hf", "qlora", "none")}


def test_no_example_is_deployed() -> None:
    """Argo CD's ApplicationSet reads environments/ alone."""
    assert not [name for name in EXAMPLES if name.startswith("environments/")]
    assert not {environments.load(name).name for name in EXAMPLES} & set(environments.names())


def test_the_mixed_examples_are_runs_of_one_site() -> None:
    for file in ("site.yaml", "release.yaml"):
        assert len({(REPOSITORY / name / file).read_text(encoding="utf-8") for name in EXAMPLES if "mixed" in name}) == 1


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_run_is_a_recipe(name: str) -> None:
    """docs/large-models.md, models.md and the example speak of the same run."""
    run = run_of(name)
    recipe = next(r for r in recipes.names() if recipes.load(r).run.name == run.run.name)
    assert run.run == recipes.load(recipe).run
    assert f"trainer/recipes/{recipe}.yaml" in (REPOSITORY / name / "finetune.yaml").read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_run_fits_the_site(name: str) -> None:
    found, groups = plan(run_of(name), advise=False), groups_of(name)
    assert found.fits
    assert sum(g["pods"] * g["gpus"] for g in groups) == found.workers, "every GPU is used, and none is missing"
    assert [(g["pods"] * g["gpus"]) for g in groups] == [g.group.workers for g in found.groups]
    for group, planned in zip(groups, found.groups, strict=True):
        assert planned.group.gpu is not None
        assert group["product"] is None or group["product"] in GPUS[planned.group.gpu.name].products
        processes = 8 * GIB * group["gpus"]  # Python, CUDA and its pinned buffers
        assert found.host_bytes + processes <= group["memory"], f"{found.host_bytes / GIB:.0f} GiB of each host"
    claims = [m for (kind, *_), m in diff.render(name).items() if kind == "PersistentVolumeClaim"]
    assert found.storage_bytes <= size(claims[0]["spec"]["resources"]["requests"]["storage"])


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_printed_helm_command(name: str) -> None:
    command = environments.helm_command(name)
    assert command[:3] == ["helm", "upgrade", "--install"]
    assert command[command.index("--namespace") + 1] == f"llm-finetune-{environments.load(name).name}"
    assert [c for c, flag in zip(command[1:], command, strict=False) if flag == "--values"] == [
        str(REPOSITORY / name / file) for file in environments.ORDER]
    kinds = {kind for kind, *_ in diff.render(name)}
    assert {"RayJob", "RayCluster", "DaemonSet", "Deployment", "PersistentVolume"} <= kinds


def test_an_example_is_checked_like_an_environment(tmp_path: Any) -> None:
    import shutil

    for folder in ("environments", "charts", environments.EXAMPLES):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    path = tmp_path / environments.EXAMPLES / "mixed-7b-full/site.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("  nodes: 4\n", "  nodes: four\n"), encoding="utf-8")
    (finding,) = environments.check(tmp_path)
    assert finding.path == path and "global.nodes" in finding.message
    value = yaml.safe_load((tmp_path / environments.EXAMPLES / "one-server-13b-full/release.yaml").read_text(encoding="utf-8"))
    assert value["chatbot"] == {"enabled": False}
