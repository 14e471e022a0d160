"""What `make up` promises: a real run, a better model, a chatbot that answers with it, and git as the only handle."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import httpx
import pytest
import yaml
from kubernetes import client

from tools import results as results_module
from tools.cluster import registry, status
from tools.layout import REPOSITORY


@pytest.fixture
def settled(environment, wait_for, layout, settings):
    """Waits until the Application has what git says now, and its run has ended; returns that state."""
    def wait() -> status.State:
        head = subprocess.check_output(["git", "-C", registry.git_repository(layout, settings), "rev-parse", registry.BRANCH], text=True)

        def found() -> status.State | None:
            state = environment()
            return state if head.startswith(state.revision or "none") and state.sync == "Synced" and state.run_ended else None
        return wait_for(found, 180, "the run that git names")
    return wait


def test_everything_is_delivered_by_argo_cd(environment):
    state = environment()
    assert (state.sync, state.health) == ("Synced", "Healthy"), state.message


def test_the_run_succeeded(environment):
    state = environment()
    assert state.run is not None
    assert state.run.job == "SUCCEEDED", state.run.message


def test_tuned_is_better_than_base_on_held_out_rows(environment, layout):
    name = environment().run.name
    numbers = results_module.results(layout.storage / "runs" / name)
    assert numbers["run"] == name
    assert numbers["tuned"]["loss"] < numbers["base"]["loss"]
    assert numbers["tuned"]["perplexity"] < numbers["base"]["perplexity"]
    assert numbers["train"]["steps"] > 0
    assert numbers["train"]["tokens"] > 5000
    assert numbers["train"]["tokens_per_second"] > 0


def test_the_report_is_whole(environment, layout):
    folder = layout.storage / "runs" / environment().run.name
    for name in ("run.yaml", "dataset/manifest.json", "metrics.jsonl", "network.csv", "evaluation.json", "model/manifest.json",
                 "report.json", "report.md", "report.html"):
        assert (folder / name).is_file(), name
    html = (folder / "report.html").read_text()
    assert "<svg" in html
    assert "http://" not in html.replace("http://www.w3.org", ""), "the report must not ask for anything from outside"


def test_the_chatbot_answers_with_a_finished_run(layout, settings):
    answer = httpx.post(f"http://127.0.0.1:{settings.chatbot_port}/ask", timeout=180,
                        json={"question": "Does exercise lower blood pressure?"})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["answer"].strip()
    # The local environment follows the newest finished run, whichever it is; the answer must say which.
    finished = [path.parent.name for path in (layout.storage / "runs").glob("*/report.json")]
    assert any(name in json.dumps(body) for name in finished), "the answer does not say which run it comes from"


def test_both_pages_open(settings):
    assert "html" in httpx.get(f"http://127.0.0.1:{settings.chatbot_port}/", timeout=30).text.lower()
    assert "Ray Dashboard" in httpx.get(f"http://127.0.0.1:{settings.dashboard_port}/", timeout=30).text


def test_make_commands_for_newcomers(layout):
    def command(*words: str) -> str:
        return subprocess.check_output([sys.executable, "-m", "tools", *words], cwd=REPOSITORY, text=True, timeout=300)
    numbers = json.loads(command("results"))
    assert {"run", "state", "base", "tuned", "train"} <= set(numbers)
    assert command("ask", "Does coffee raise blood pressure?").strip()
    screen = command("status")
    for words in ("containerd", "llm-finetune-local/", "Synced", "SUCCEEDED", "http://localhost:7860", "http://localhost:30265"):
        assert words in screen


def test_a_second_up_is_quick():
    begin = time.monotonic()
    subprocess.check_call([sys.executable, "-m", "tools", "up"], cwd=REPOSITORY, timeout=120, stdout=subprocess.DEVNULL)
    assert time.monotonic() - begin < 30


@pytest.mark.timeout(1500)
def test_a_push_of_another_learning_rate_starts_another_run(checkout, push, environment, wait_for, layout, api, namespace):
    first = environment().run.name
    path = checkout / "environments/local/finetune.yaml"
    text = path.read_text()
    rate = yaml.safe_load(text)["finetune-job"]["run"]["train"]["learning_rate"]
    line = next(line for line in text.splitlines() if "learning_rate:" in line)
    path.write_text(text.replace(line, line.split(":")[0] + f": {rate * 2}"))
    push(checkout, "Twice the learning rate")
    second = wait_for(lambda: (run := environment().run) and run.name != first and run, 120, "a new RayJob").name
    assert second.rpartition("-")[0] == first.rpartition("-")[0], "the run keeps its name, only its hash changes"
    wait_for(lambda: environment().run_ended or (environment().failure and pytest.fail(environment().failure)), 1200, "the new run")
    assert (layout.storage / "runs" / first / "report.json").is_file(), "the first run's directory stays"
    assert (layout.storage / "runs" / second / "report.json").is_file()
    names = {job["metadata"]["name"] for job in client.CustomObjectsApi(api).list_namespaced_custom_object(
        *status.RAY, namespace, "rayjobs")["items"]}
    assert {first, second} <= names, "the first RayJob stays"


def test_going_back_finds_the_old_run_finished(settled, layout):
    """The push before was taken back: the first run is wanted again, and nothing trains."""
    runs = {path.name for path in (layout.storage / "runs").iterdir()}
    assert settled().run.name in runs
    time.sleep(20)
    assert {path.name for path in (layout.storage / "runs").iterdir()} == runs


@pytest.mark.timeout(600)
def test_a_finished_run_is_never_trained_again(settled, environment, wait_for, layout, api, namespace):
    """Its RayJob deleted and made anew, the operator restarted, the Application deleted and made anew: what is finished stays as it is."""
    run = settled().run.name
    folder = layout.storage / "runs" / run
    custom, core = client.CustomObjectsApi(api), client.CoreV1Api(api)

    def uid(group: tuple[str, str], where: str, plural: str, name: str) -> str:
        found = custom.list_namespaced_custom_object(*group, where, plural)["items"]
        return next((o["metadata"]["uid"] for o in found if o["metadata"]["name"] == name), "")

    def trained() -> dict[str, int]:
        """When dataset, checkpoints, metrics and model were last written."""
        kept = [folder / "dataset/manifest.json", folder / "metrics.jsonl", folder / "model/manifest.json",
                *(folder / "checkpoints").glob("*/manifest.json")]
        return {str(path): path.stat().st_mtime_ns for path in kept}

    before, runs = trained(), {path.name for path in (layout.storage / "runs").iterdir()}
    assert len(before) > 3
    jobs = (status.RAY, namespace, "rayjobs", run)
    first = uid(*jobs)
    custom.delete_namespaced_custom_object(*status.RAY, namespace, "rayjobs", run)
    core.delete_collection_namespaced_pod(namespace, label_selector="app.kubernetes.io/name=kuberay-operator")
    wait_for(lambda: uid(*jobs) not in ("", first), 120, "the RayJob made anew")
    wait_for(lambda: environment().run_ended, 300, "the run, finished again")
    applications = (status.ARGO[:2], status.ARGO[2], status.ARGO[3], "llm-finetune-local")
    first, job = uid(*applications), uid(*jobs)
    custom.delete_namespaced_custom_object(*status.ARGO, "llm-finetune-local")
    wait_for(lambda: uid(*applications) not in ("", first), 120, "the Application made anew")
    wait_for(lambda: (s := environment()).sync == "Synced" and s.run_ended, 180, "Synced, with the run")
    assert uid(*jobs) == job, "the Application's objects outlive it"
    assert trained() == before and {path.name for path in (layout.storage / "runs").iterdir()} == runs
