"""Launching on Ray: what is retried, what is not, and (slow) a real worker group whose workers are killed."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray.train
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from trainer import config as configuration
from trainer import failures, launch
from trainer import memory as memory_of
from trainer.errors import ConfigError, UserError
from trainer.train.progress import read
from trainer.train.stop import Preempted


def lost(**failures):
    """A worker group error as Ray Train hands it to the failure policy."""
    wrapped = {int(rank[1:]): UserExceptionWithTraceback(e, "Traceback ...") if not isinstance(e, ray.exceptions.RayActorError) else e
               for rank, e in failures.items()}
    return WorkerGroupError("some workers failed", wrapped)


def test_errors_that_only_the_user_can_mend_are_not_retried(capsys):
    policy = failures.FailurePolicy(ray.train.FailureConfig(max_failures=5))
    assert policy.make_decision(lost(r0=RuntimeError("peer"), r1=UserError("Lower the rate."))) == FailureDecision.RAISE
    assert capsys.readouterr().out == ""


def test_losses_are_counted_and_said_in_one_line(capsys):
    policy = failures.FailurePolicy(ray.train.FailureConfig(max_failures=2))
    decisions = [policy.make_decision(lost(r1=RuntimeError("connection closed\nby peer"))) for _ in range(3)]
    assert decisions == [FailureDecision.RETRY, FailureDecision.RETRY, FailureDecision.RAISE]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("The workers stopped (loss 1 since the last new checkpoint, at most 2 are mended): "
                        "worker 1: RuntimeError: connection closed. Starting again from the last checkpoint.")
    assert len(lines) == 3 and lines[2].endswith("Giving up.")


def test_out_of_memory_is_named_with_the_remedy():
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    killed = WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.OutOfMemoryError("Task was killed"))
    text = failures.describe(WorkerGroupError("x", {1: killed, 0: UserExceptionWithTraceback(RuntimeError("connection reset"), "t")}))
    assert "worker 1 was killed because its node ran out of memory" in text and "trainer plan" in text and "worker 0: RuntimeError" in text


def test_a_run_that_gets_on_is_never_given_up(tmp_path):
    policy = failures.FailurePolicy(ray.train.FailureConfig(max_failures=1), tmp_path / "checkpoints")
    for step in range(5):
        (tmp_path / f"checkpoints/step-{step}").mkdir(parents=True)
        assert policy.make_decision(lost(r0=RuntimeError("x"))) == FailureDecision.RETRY
    (tmp_path / "checkpoints/step-9.tmp").mkdir()
    assert policy.make_decision(lost(r0=RuntimeError("x"))) == FailureDecision.RAISE


def test_workers_that_die_while_they_start_are_not_started_for_ever(capsys):
    """Ray Train tries that again without an end by itself."""
    policy = failures.FailurePolicy(ray.train.FailureConfig(max_failures=1))
    error = ControllerError(WorkerGroupStartupFailedError("At least one of the worker actors failed to initialize."))
    assert [policy.make_decision(error) for _ in range(2)] == [FailureDecision.RETRY, FailureDecision.RAISE]
    waiting = ControllerError(WorkerGroupStartupTimeoutError(num_workers=2))
    assert [policy.make_decision(waiting) for _ in range(5)] == [FailureDecision.RETRY] * 5
    assert "failed to initialize" in capsys.readouterr().out


def test_what_the_kernel_killed_is_named_with_limit_and_plan(monkeypatch, capsys):
    monkeypatch.setattr(failures, "_pods", {})
    monkeypatch.setattr(failures, "_killed", {})
    pods = [memory_of.Container("pod-a", 6 << 30, 3), memory_of.Container("pod-b", 6 << 30, 0)]
    policy = failures.FailurePolicy(ray.train.FailureConfig(max_failures=1), need="by the plan 4.1 GiB")
    failures.started(pods)  # what was killed there before is none of this run's
    died = lost(r0=ray.exceptions.ActorDiedError(), r1=RuntimeError("connection reset"))
    assert policy.make_decision(died) == FailureDecision.RETRY
    failures.started([memory_of.Container("pod-a", 6 << 30, 4), pods[1]])
    assert policy.make_decision(died) == FailureDecision.RAISE
    first, kernel, last = capsys.readouterr().out.splitlines()
    assert "memory" not in first
    assert "has killed 1 process(es) of worker 0's pod pod-a" in kernel and "limit of 6.0 GiB" in kernel
    assert "worker 0 was killed because its pod ran out of memory" in last
    assert "(the memory limit of its pod pod-a is 6.0 GiB; by the plan 4.1 GiB" in last
    assert last.endswith("worker 1: RuntimeError: connection reset. Giving up.")
    # The driver says the same: it gets the error by Ray, and knows nothing of the pods.
    monkeypatch.setattr(failures, "_pods", {})
    assert f"{failures.reason(pickle.loads(pickle.dumps(died)), None)}. Giving up." == last.partition("are mended): ")[2]


def test_a_worker_that_ended_without_a_word_may_have_lacked_memory():
    text = failures.describe(lost(r0=ray.exceptions.ActorDiedError()), "by the plan 4.1 GiB", final=True)
    assert "OOMKilled" in text and "by the plan 4.1 GiB" in text


def test_the_plan_names_a_workers_host_memory(tmp_path):
    run = {"name": "x", "model": {"path": "m", "architecture": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}},
           "data": {"sample": True}}
    config = configuration.parse({"storage": str(tmp_path), "run": run})
    assert re.search(r"trainer plan` a worker holds \d+\.\d GiB", failures.planned(config))
    run["model"] = {"path": "missing"}
    assert failures.planned(configuration.parse({"storage": str(tmp_path), "run": run})) == ""


@pytest.mark.parametrize(("files", "limit", "killed"), [
    ({"memory.max": "1073741824\n", "memory.events": "low 0\noom 2\noom_kill 1\n"}, 1 << 30, 1),
    ({"memory.max": "max\n", "memory.events": "oom_kill 0\n"}, 0, 0),
    ({"memory/memory.limit_in_bytes": "2147483648\n", "memory/memory.oom_control": "under_oom 0\noom_kill 5\n"}, 2 << 30, 5),
    ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 0, 0), ({}, 0, 0),
])
def test_a_containers_memory_in_both_versions_of_cgroups(tmp_path, files, limit, killed):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = memory_of.container(tmp_path)
    assert (found.limit, found.killed) == (limit, killed)


@pytest.mark.parametrize(("error", "says"), [(ray.exceptions.OutOfMemoryError("x"), "ran out of memory"),
                                             (ray.exceptions.WorkerCrashedError(), "OOMKilled")])
def test_a_preparation_without_memory_ends_with_the_remedy(monkeypatch, tmp_path, error, says):
    def fails(_):
        raise error

    class Task:
        def options(self, **_):
            return self

        def remote(self, _):
            return None

    monkeypatch.setattr(launch.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}])
    monkeypatch.setattr(launch.ray, "remote", lambda _: Task())
    monkeypatch.setattr(launch.ray, "get", fails)
    document = {"storage": str(tmp_path), "run": {"name": "x", "model": {"path": "m"}, "data": {"sample": True}}}
    with pytest.raises(UserError, match=says):
        launch.prepare(configuration.parse(document))
    assert launch.os.environ["RAY_task_oom_retries"] == "3"


def test_preemption_does_not_count():
    policy = failures.FailurePolicy(ray.train.FailureConfig(max_failures=1))
    for _ in range(5):
        assert policy.make_decision(lost(r0=Preempted("asked to end"))) == FailureDecision.RETRY
    assert policy.make_decision(lost(r0=RuntimeError("x"))) == FailureDecision.RETRY
    assert policy.make_decision(lost(r0=RuntimeError("x"))) == FailureDecision.RAISE


def test_user_error_is_found_inside_what_ray_wraps_around_it():
    inner = ConfigError("run.seed", -1, "Give another.")
    assert failures.user_error(lost(r3=inner)) is inner
    assert failures.user_error(lost(r3=ValueError("x"))) is None and failures.user_error(None) is None


def test_policies_travel_to_the_controller():
    from ray import cloudpickle

    for policy in (failures.FailurePolicy(ray.train.FailureConfig()), launch.FixedSize(ray.train.ScalingConfig(num_workers=2)),
                   launch.ProcessGroup(gpus=True)):
        assert type(cloudpickle.loads(cloudpickle.dumps(policy))) is type(policy)


@pytest.mark.parametrize(("nodes", "room"), [
    ([{"CPU": 1}, {"CPU": 1}], 2), ([{}, {"CPU": 0.5}], 0), ([{"CPU": 8, "GPU": 2}], 8),
])
def test_room(monkeypatch, tmp_path, nodes, room):
    alive = [{"Alive": True, "Resources": n} for n in nodes]
    monkeypatch.setattr(launch.ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 9}}])
    document = {"storage": str(tmp_path), "resources": {"workers": 2},
                "run": {"name": "x", "model": {"path": "m"}, "data": {"sample": True}}}
    assert launch.room(configuration.parse(document)) == room
    document["resources"] = {"workers": 2, "gpus_per_worker": 1}
    assert launch.room(configuration.parse(document)) == min(room, sum(int(n.get("GPU", 0)) for n in nodes))


# On Ray, with a small random Llama and two workers of one CPU -------------------------------------------------------------------

ROWS = 120


def storage(directory: Path) -> Path:
    """A storage with a tokenizer of the model's own and a dataset, made without the network; returns the configuration file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(200)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator([" ".join(words)], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>").save_pretrained(
        directory / "model")
    with open(directory / "rows.jsonl", "w", encoding="utf-8") as file:
        for i in range(ROWS):
            question = " ".join(words[(i * 7 + k * 3) % 200] for k in range(8))
            answer = " ".join(words[(i * 11 + k * 5) % 200] for k in range(6 + i % 9))
            print(json.dumps({"id": f"r{i}", "question": question, "answer": answer, "decision": ["yes", "no", "maybe"][i % 3]}), file=file)
    path = directory / "config.yaml"
    path.write_text(json.dumps({
        "storage": str(directory), "resources": {"workers": 2, "cpus_per_worker": 1},
        "run": {"name": "faults", "data": {"path": "rows.jsonl", "max_tokens": 256, "context": False, "near_duplicates": 1},
                "model": {"path": "model", "dtype": "float32", "architecture": {
                    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                    "max_position_embeddings": 512}},
                "train": {"epochs": 15, "tokens_per_step": 2048, "micro_batch_tokens": 1024, "learning_rate": 1e-3, "eval_every": 100},
                "engine": {"kind": "fsdp", "checkpointing": "none", "compile": False}, "checkpoint": {"every_steps": 20},
                "evaluation": {"rows": 8, "generate_rows": 2, "max_new_tokens": 4, "samples": 2}, "export": {"dtype": "float32"}}}))
    return path


def start(path, name):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen([sys.executable, "-m", "trainer", "run", "--config", str(path), "--id", name], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=environment)


def workers_of(driver: int) -> list[int]:
    """Processes of Ray's training workers that belong to the driver's Ray instance."""
    import psutil

    return [p.pid for p in psutil.Process(driver).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_errors_of_a_task_are_one_message(tmp_path):
    path = storage(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"id": "1", "question": "", "answer": ""}\n')
    process = start(path, "faults-empty")
    text = process.communicate(timeout=600)[0]
    error = [line for line in text.splitlines() if line.startswith("Error: ")]
    assert process.returncode == 2 and len(error) == 1 and "Traceback" not in text and "ray::" not in error[0], text


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_and_terminated_workers_end_with_the_same_loss(tmp_path):
    path = storage(tmp_path)
    whole = start(path, "faults-whole")
    assert whole.wait(600) == 0, whole.stdout.read()
    disturbed = start(path, "faults-killed")
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(disturbed.stdout), daemon=True)
    reader.start()
    root = tmp_path / "runs" / "faults-killed"
    for number, step in ((signal.SIGKILL, 25), (signal.SIGTERM, 45)):
        restarts = sum("Starting again" in line for line in lines)
        deadline, sent = time.monotonic() + 600, False
        while time.monotonic() < deadline and disturbed.poll() is None and sum("Starting again" in line for line in lines) == restarts:
            progress = read(root / "progress.json") or {}
            due = not sent and progress.get("stage") == "train" and (progress.get("step") or 0) >= step
            pids = workers_of(disturbed.pid) if due else []
            if len(pids) == 2:
                os.kill(pids[-1], number)
                sent = True
            time.sleep(0.05)
        assert sent, "".join(lines)
    assert disturbed.wait(600) == 0, "".join(lines)
    reader.join(10)
    text = "".join(lines)
    assert len(re.findall("Starting again from the last checkpoint", text)) == 2, text
    assert "Preempted" in text
    curves = []
    for name in ("faults-whole", "faults-killed"):
        records = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in records] == list(range(1, len(records) + 1))
        curves.append([r["loss"] for r in records])
    assert curves[0] == curves[1]
    reports = [json.loads((tmp_path / "runs" / name / "report.json").read_text()) for name in ("faults-whole", "faults-killed")]
    assert reports[0]["checkpoint_sha256"] == reports[1]["checkpoint_sha256"]
