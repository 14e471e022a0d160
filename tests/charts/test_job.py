"""The run: its name, its configuration on the way through Helm, KubeRay and the submitter's shell, and where it runs."""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.conftest import GPU, JOB, RUN, SITES, Values, helm, join, one, render
from tools import charts, runid
from tools.errors import OperatorError

AWKWARD = r"""
finetune-job:
  enabled: true
  run:
    name: x
    model:
      path: a
      architecture:
        a: [1e-5, 1e-7, 1.5e-9, 1e21, 1e20, 123456789012345678, 1.0, 0.1, 100, 1e5, 0.000001, 9.9e-7, 1e+2, .5, 5., -1e-7, -0.0, 017, 0o17,
            0x1f, 1_000, 12345678901234567890, 0b11, 3.0e8, 1.7976931348623157e308, 5e-324, +3, -12]
        b: [yes, no, on, off, "yes", y, n, True, FALSE, .inf2, 2020-01-01, 12:30:00, 1e, +12, "<&>", "é\u2028\u2029\x7f\t\n\b\f/\\\"", "💥",
            ".", -, !!str 12, '$(touch /tmp/x) `id` $HOME !! \', "\u200b\u00ad\x01"]
        c: {z: 1, a: 2, é: 3, B: 4, n: 1, 12: 3, 1.5: 2, deep: {k: []}}
        e: {}
    data: {sample: true}
"""


def rayjob(values: Values) -> dict[str, Any]:
    return one(render(values), "RayJob")


def config_text(job: dict[str, Any]) -> str:
    return yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["LLM_FINETUNE_CONFIG"]


def awkward(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """The RayJob of AWKWARD, read by helm from a file as it is."""
    path = tmp_path / "values.yaml"
    path.write_text(AWKWARD, encoding="utf-8")
    done = subprocess.run([charts.helm(), "template", "x", str(charts.CHART), "--namespace", "train", "--values", str(path)],
                          capture_output=True, text=True, check=True)
    return one([d for d in yaml.safe_load_all(done.stdout) if d], "RayJob"), path


def test_python_names_the_run_as_helm_does(tmp_path: Path) -> None:
    job, path = awkward(tmp_path)
    assert job["metadata"]["name"] == runid.of_values([path])


def test_canonical_json_is_gos(tmp_path: Path) -> None:
    """Not only equal hashes: the same text, number by number."""
    job, path = awkward(tmp_path)
    passed = json.loads(config_text(job), parse_int=float)["run"]
    read = runid.read_values(path)["finetune-job"]["run"]
    assert runid.canonical(passed) == runid.canonical(read)


def test_python_names_random_numbers_as_helm_does() -> None:
    """200 numbers of all magnitudes in one rendering."""
    dice = random.Random(5)
    numbers = [dice.choice([-1, 1]) * dice.random() * 10 ** dice.randint(-30, 30) for _ in range(150)]
    numbers += [dice.randint(-2**60, 2**60) for _ in range(50)]
    run = {**RUN, "model": {"path": "m", "architecture": {"n": numbers}}}
    job = rayjob({"finetune-job": {"enabled": True, "run": run}})
    assert job["metadata"]["name"] == runid.run_id("llm-finetune/trainer:0.1.0", run)


def test_the_name_follows_from_run_and_image_alone() -> None:
    name = rayjob(JOB)["metadata"]["name"]
    assert re.fullmatch(r"pubmedqa-[0-9a-f]{10}", name)
    same = join(JOB, GPU, {"finetune-job": {"resources": {"workers": 7}, "submission": {"mode": "HTTPMode"}, "env": {"A": "b"}},
                           "ray-cluster": {"workerDefaults": {"replicas": 7}},
                           "global": {"storage": {"mountPath": "/mnt"}, "images": {"chatbot": {"tag": "2"}}}})
    assert rayjob(same)["metadata"]["name"] == name
    reordered = {"finetune-job": {"run": dict(reversed(RUN.items())), "enabled": True}}
    assert rayjob(reordered)["metadata"]["name"] == name
    digest = "sha256:" + "c" * 64
    for changed in (join(JOB, {"finetune-job": {"run": {"seed": 18}}}), join(JOB, {"global": {"images": {"trainer": {"tag": "0.2.0"}}}}),
                    join(JOB, {"global": {"images": {"trainer": {"digest": digest}}}}),
                    join(JOB, {"finetune-job": {"run": {"train": {"learning_rate": 2e-5}}}})):
        assert rayjob(changed)["metadata"]["name"] != name
    one_digest = {"global": {"images": {"trainer": {"digest": digest}}}}
    elsewhere = {"global": {"images": {"trainer": {"digest": digest, "repository": "registry.example.org/t", "tag": "9"}}}}
    assert rayjob(join(JOB, one_digest))["metadata"]["name"] == rayjob(join(JOB, elsewhere))["metadata"]["name"]


def test_python_reads_several_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("global: {images: {trainer: {tag: '3'}}}\n"
                                     "finetune-job: {run: {name: one, seed: 1, train: {epochs: 1}}}\n")
    (tmp_path / "b.yaml").write_text("finetune-job: {run: {seed: 2, train: {learning_rate: 1e-5}}}\n")
    expected = runid.run_id("llm-finetune/trainer:3", {"name": "one", "seed": 2, "train": {"epochs": 1, "learning_rate": 1e-5}})
    assert runid.of_values([tmp_path / "a.yaml", tmp_path / "b.yaml"]) == expected
    digest = {"global": {"images": {"trainer": {"digest": "sha256:" + "d" * 64}}}}
    expected = runid.run_id("sha256:" + "d" * 64, {"name": "one", "seed": 1, "train": {"epochs": 1}})
    assert runid.of_values([tmp_path / "a.yaml"], digest) == expected


@pytest.mark.parametrize(("text", "told"), [("a: [", "cannot be read as YAML"), ("- 1", "not a mapping"),
                                             ("global: {}", "describe no run")])
def test_python_refuses_what_is_no_run(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(OperatorError, match=told):
        runid.of_values([tmp_path / "a.yaml"])


def test_python_refuses_null() -> None:
    with pytest.raises(OperatorError, match="leave a key out"):
        runid.run_hash("i", {"name": "x", "seed": None})


def test_the_trainer_reads_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import config
    run = {**RUN, "train": {"learning_rate": 2e-5, "tokens_per_step": 1024, "micro_batch_tokens": 512, "epsilon": 1e-9}}
    job = rayjob({"finetune-job": {"enabled": True, "run": run, "resources": {"workers": 2}},
                  "ray-cluster": {"workerDefaults": {"cpus": 2}}})
    monkeypatch.setenv("LLM_FINETUNE_CONFIG", config_text(job))
    read = config.load("env:LLM_FINETUNE_CONFIG")
    assert (read.run.train.learning_rate, read.run.train.epsilon, read.resources.workers, read.storage) == (2e-5, 1e-9, 2, "/storage")
    assert read.run_id == job["metadata"]["name"]
    assert job["spec"]["entrypoint"].split() == ["python", "-m", "trainer", "run", "--config", "env:LLM_FINETUNE_CONFIG"]


def go_quote(text: str) -> str:
    """Go's strconv.Quote for the characters at hand: KubeRay puts the runtime environment into a shell command with it."""
    named = {"\a": r"\a", "\b": r"\b", "\f": r"\f", "\n": r"\n", "\r": r"\r", "\t": r"\t", "\v": r"\v", '"': r"\"", "\\": r"\\"}
    shown = []
    for character in text:
        if character in named:
            shown.append(named[character])
        elif character.isprintable() and character not in "\u00ad":
            shown.append(character)
        elif ord(character) < 128:
            shown.append(f"\\x{ord(character):02x}")
        else:
            shown.append(f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}")
    return f'"{"".join(shown)}"'


def test_the_submitters_shell_changes_nothing_and_runs_nothing(tmp_path: Path) -> None:
    """KubeRay writes `ray job submit --runtime-env-json "<quoted by Go>"` for bash, which would read $ and ` in it."""
    job, _ = awkward(tmp_path)
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    command = f"printf %s {go_quote(json.dumps(environment, ensure_ascii=False))}"
    seen = subprocess.run(["bash", "-ce", command], capture_output=True, text=True, check=True, cwd=tmp_path, env={"HOME": "/home"}).stdout
    assert json.loads(seen) == environment
    run = json.loads(json.loads(seen)["env_vars"]["LLM_FINETUNE_CONFIG"])["run"]
    assert r"$(touch /tmp/x) `id` $HOME !! " + "\\" in run["model"]["architecture"]["b"]


def test_kuberays_rules_for_the_standing_cluster() -> None:
    """ValidateRayJobSpec of KubeRay 1.6: with a selector no backoffLimit above 0, no suspend, no SidecarMode, no cluster."""
    spec = rayjob(JOB)["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": "llm-finetune"}
    assert not {"backoffLimit", "suspend", "rayClusterSpec", "deletionStrategy", "ttlSecondsAfterFinished"} & set(spec)
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode") and spec["shutdownAfterJobFinishes"] is False
    assert one(render(JOB), "RayCluster")["metadata"]["name"] == "llm-finetune"


def test_kuberays_rules_for_a_cluster_of_its_own() -> None:
    manifests = render(SITES["clusters of their own"])
    spec = one(manifests, "RayJob")["spec"]
    assert "clusterSelector" not in spec and spec["shutdownAfterJobFinishes"] is True and spec["backoffLimit"] == 2
    assert "upgradeStrategy" not in spec["rayClusterSpec"]
    assert not [m for m in manifests if m["kind"] == "RayCluster"]
    standing = copy.deepcopy(SITES["clusters of their own"])
    standing["global"]["rayCluster"]["standing"] = True
    standing["finetune-job"]["kueue"] = {}
    cluster = one(render(standing), "RayCluster")["spec"]
    cluster.pop("upgradeStrategy")
    assert cluster == spec["rayClusterSpec"]


def test_the_submitter_lives_longer_than_a_lost_head() -> None:
    job = rayjob(JOB)["spec"]
    assert job["submitterConfig"]["backoffLimit"] >= 6
    pod = job["submitterPodTemplate"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert "/dev/tcp/llm-finetune-head-svc/8265" in pod["initContainers"][0]["args"][0], "it waits for the head instead of failing"
    own = rayjob(join(JOB, {"global": {"rayCluster": {"standing": False}}}))["spec"]
    assert "initContainers" not in own["submitterPodTemplate"]["spec"], "the name of a cluster of its own is made by KubeRay"
    assert "submitterPodTemplate" not in rayjob(join(JOB, {"finetune-job": {"submission": {"mode": "HTTPMode"}}}))["spec"]


def test_runs_stay() -> None:
    annotations = rayjob(JOB)["metadata"]["annotations"]
    assert annotations["helm.sh/resource-policy"] == "keep"
    assert "Prune=false" in annotations["argocd.argoproj.io/sync-options"]
    assert annotations["argocd.argoproj.io/compare-options"] == "IgnoreExtraneous"


def test_no_secret_in_the_run() -> None:
    values = join(JOB, {"ray-cluster": {"secretEnv": [{"name": "HF_TOKEN", "secretName": "hugging-face", "key": "token"}]}})
    manifests = render(values)
    assert "HF_TOKEN" not in json.dumps(one(manifests, "RayJob"))
    spec = one(manifests, "RayCluster")["spec"]
    for template in (spec["headGroupSpec"]["template"], spec["workerGroupSpecs"][0]["template"]):
        variable = next(v for v in template["spec"]["containers"][0]["env"] if v["name"] == "HF_TOKEN")
        assert variable["valueFrom"]["secretKeyRef"] == {"name": "hugging-face", "key": "token", "optional": False}


def load_retention() -> Any:
    import importlib.util
    spec = importlib.util.spec_from_file_location("retention", charts.CHART / "charts/finetune-job/files/retention.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_retention_keeps_the_newest_the_running_and_the_current() -> None:
    def job(name: str, day: int, status: str) -> dict[str, Any]:
        return {"metadata": {"name": name, "creationTimestamp": f"2026-01-{day:02}T00:00:00Z"}, "status": {"jobDeploymentStatus": status}}

    jobs = [job("a", 1, "Complete"), job("b", 2, "Failed"), job("c", 3, "Running"), job("d", 4, "Complete"), job("e", 5, "Complete"),
            {"metadata": {"name": "new", "creationTimestamp": "2026-01-06T00:00:00Z"}}]
    superfluous = load_retention().superfluous
    assert superfluous(jobs, keep=2, current="x") == ["b", "a"]
    assert superfluous(jobs, keep=2, current="b") == ["a"]
    assert superfluous(jobs, keep=9, current="x") == []


def test_retention_script_is_in_the_config_map() -> None:
    manifests = render(SITES["mixed GPUs"])
    data = one(manifests, "ConfigMap", "site-finetune-job-retention")["data"]
    assert data["retention.py"].strip() == (charts.CHART / "charts/finetune-job/files/retention.py").read_text().strip()
    cron = one(manifests, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "CURRENT", "value": one(manifests, "RayJob")["metadata"]["name"]} in cron["env"]


def test_notes_name_the_next_three_things() -> None:
    for values in (SITES["default"], SITES["one node"]):
        code, out, err = helm(values, notes=True)
        assert code == 0, err
        notes = out[out.index("Next:"):]
        for number in ("\n1. ", "\n2. ", "\n3. "):
            assert number in notes
        assert "port-forward service/llm-finetune-dashboard 8265" in notes
    assert "get secret token " in notes and "service/site-chatbot 7860" in notes
