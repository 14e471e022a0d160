"""`make up`: from a fresh machine to a fine-tuned model that answers, in steps that can be interrupted anywhere and repeated."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path

import yaml
from kubernetes import client

from tools import argocd, charts, environments, images, runid, shell
from tools.cluster import kubernetes, model, network, policies, preflight, registry, site, sources, status, steps
from tools.cluster.settings import Settings
from tools.cluster.steps import Say, Steps
from tools.errors import OperatorError
from tools.layout import Layout
from tools.progress import Step, clock

ENVIRONMENT = "local"
OWNER = 1000
"""User of trainer and chatbot containers, who owns the storage."""
RUN_TIMEOUT = 45 * 60
"""Seconds after which waiting for the first run and the chatbot is given up."""


class Up(Steps):
    """A cluster of one server with Argo CD, the local environment's run and its chatbot."""

    def __init__(self, layout: Layout, settings: Settings) -> None:
        super().__init__(layout, settings, kubernetes.Server(settings.name, settings.address))
        self.chart_digest = ""
        """Of the chart that was pushed."""

    def steps(self) -> list[Step]:
        """All of it. Two run at once: compilers on one side, downloads and image layers on the other."""
        chain = self._sources(sources.sources(self.settings))
        policies = chain[-1].name  # a service of the node, in no image: compiled while the images are made
        return [
            Step("Debian packages", self.packages, 15),
            *chain,
            Step("node services", self.services, 3, after=("Debian packages",)),
            self._image("base", 60, "Debian packages"),
            self._image("torch", 240, "base image"),
            self._image("trainer", 120, "torch image"),
            Step("base model", self.model, 10, after=("node services",)),
            Step("trainer image to the node", lambda say: self.publish("trainer", say), 150, after=("trainer image", "node services")),
            self._image("chatbot", 60, "trainer image to the node"),
            Step("chatbot image to the node", lambda say: self.publish("chatbot", say), 30, after=("chatbot image",)),
            Step("node images", self.node_images, 60, after=("base image", "node services", *(step.name for step in chain[:-1]))),
            Step("Kubernetes", self.kubernetes, 60, after=("node images", policies)),
            Step("chart", self.chart, 5, after=("kuberay from source", "helm from source", "node services")),
            Step("Argo CD", self.argocd, 40, after=("Kubernetes", "chart", "chatbot image to the node", "base model")),
            Step("first run", self.first_run, 300, after=("Argo CD",)),
            Step("chatbot", self.chatbot, 60, after=("first run",)),
        ]

    def services(self, say: Say) -> bool:
        """The node's own, and the storage."""
        started = super().services(say)
        self._storage()
        return started

    def named_images(self) -> list[tuple[str, str, str]]:
        """Kubernetes' own, Argo CD's and the operator's."""
        s = self.settings
        return [*super().named_images(), ("argocd", "argocd", s.argocd_version),
                ("kuberay-operator", "kuberay-operator", s.kuberay_version)]

    def _storage(self) -> None:
        """The shared storage is a folder of the cache, so that runs survive `make down`; pods see it under the state folder."""
        storage = self.layout.storage
        for path in (storage, storage / "runs", storage / "models", storage / "chatbot"):
            path.mkdir(parents=True, exist_ok=True)
            os.chown(path, OWNER, OWNER)
        link = self.layout.state / "storage"
        if not link.is_symlink():
            link.symlink_to(storage)
        # Pods run as another user than the cache's owner: each folder on the way must let them pass.
        for folder in storage.parents:
            if folder.stat().st_mode & 0o001 == 0:
                folder.chmod(folder.stat().st_mode | 0o011)

    def model(self, say: Say) -> bool:
        return model.place(self.layout, self.layout.storage, say)

    def publish(self, name: str, say: Say) -> bool:
        """Push one of our images to the node's registry and bring it into containerd."""
        image = images.IMAGES[name]
        digest = self._builder().push(image, f"{self.settings.registry}/llm-finetune", "local", say, local=True)
        self.digests[name] = digest
        say("unpacking")
        return kubernetes.pull(self.layout, f"{self.settings.registry}/llm-finetune/{name}@{digest}", digest,
                               self.layout.logs / f"image-{name}.log")

    def kubernetes(self, say: Say) -> bool:
        changed = super().kubernetes(say)
        say("NetworkPolicies")
        return policies.engine(self.layout, self.settings).start(self.layout) or changed

    def chart(self, say: Say) -> bool:
        """Package the chart with the operator's CRDs, and push it where Argo CD pulls it."""
        charts.copy_crds(sources.module_directory(self.layout, "kuberay", charts.KUBERAY_MODULE))
        version = yaml.safe_load((charts.CHART / "Chart.yaml").read_text())["version"]
        archive = charts.package(version, self.layout.cache / "charts")
        reference = charts.push(f"{self.settings.registry}/charts", archive, plain_http=True)
        self.chart_digest = reference.partition("@")[2]
        say(reference)
        return True

    def site(self) -> argocd.Site:
        """What only this machine knows."""
        s = self.settings
        trainer, chatbot, operator = (self.digests[n] for n in ("trainer", "chatbot", "kuberay-operator"))
        return argocd.Site(
            git_url=s.git_url, chart_url=f"oci://{s.registry}/charts/llm-finetune", environments=[ENVIRONMENT, f"{ENVIRONMENT}-*"],
            git_revision=registry.BRANCH, plain_http=True,
            images={"trainer": {"repository": f"{s.registry}/llm-finetune/trainer", "digest": trainer},
                    "chatbot": {"repository": f"{s.registry}/llm-finetune/chatbot", "digest": chatbot},
                    "kuberayOperator": {"repository": f"{self.repository}/kuberay-operator", "tag": s.kuberay_version, "digest": operator}})

    def argocd(self, say: Say) -> bool:
        """Argo CD's core, then the project's own objects; git with this checkout's HEAD."""
        s = self.settings
        say("git")
        pushed = registry.push_head(self.layout, s)
        registry.git_server(self.layout, s).start(self.layout)
        say(pushed)
        api = client.CoreV1Api(kubernetes.api_client(self.layout))
        image = f"{self.repository}/argocd:{s.argocd_version}"
        secrets = argocd.new_secrets(argocd.secret_values(api))
        module = sources.module_directory(self.layout, "argocd", "github.com/argoproj/argo-cd/v3")
        say("Argo CD's controllers")
        kubernetes.apply(self.layout, argocd.core_install(module, image, image, secrets))
        # The ApplicationSet gives up for minutes if the repo-server does not answer its first question.
        for workload in ("deployment/argocd-repo-server", "deployment/argocd-applicationset-controller",
                         "statefulset/argocd-application-controller"):
            say(f"waiting for {workload}")
            kubernetes.wait_rollout(self.layout, argocd.NAMESPACE, workload)
        say("project and ApplicationSet")
        kubernetes.apply(self.layout, argocd.site_manifests(self.site()))
        for name, port, node_port in (("dashboard", s.dashboard_port, s.dashboard_port), ("chatbot", s.chatbot_port, s.chatbot_node_port)):
            network.localhost_port(self.layout, s, name, port, node_port).start(self.layout)
        return True

    def first_run(self, say: Say) -> bool:
        """Wait until the environment's run has ended well; show where it is."""
        api = kubernetes.api_client(self.layout)
        begin = time.monotonic()
        waited = False
        expected = self.expected_run()
        while True:
            state = status.environment(api, ENVIRONMENT, self.layout)
            self._drop_half_seen(api, expected)
            if state.run is None or state.run.name != expected:
                # Argo CD has not seen the newest commit or image yet: what it shows is about the run before.
                state = dataclasses.replace(state, run=None)
            pending = self.pending(state)
            if state.run_ended and not pending:
                break
            waited = True
            say(pending if state.run_ended else state.line())
            if state.failure:
                raise OperatorError(f"{state.failure}\nSee `make status`, and the run's log: {state.log_command}")
            if time.monotonic() - begin > RUN_TIMEOUT:
                raise OperatorError(f"The run has not ended within {clock(RUN_TIMEOUT)}: {state.line()}. See `make status`.")
            time.sleep(1.0)
        return waited

    def pending(self, state: status.State) -> str:
        """What of the newest commit and chart Argo CD has still to do; empty if nothing."""
        commit = shell.output(["git", "-C", registry.git_repository(self.layout, self.settings), "rev-parse", registry.BRANCH])
        if not state.revision or not commit.startswith(state.revision) or state.chart != self.chart_digest:
            return "waiting for Argo CD to see the newest commit and chart"
        return f"sync: {state.syncing[:200] or state.sync}" if state.syncing or state.sync != "Synced" else ""

    def _drop_half_seen(self, api: client.ApiClient, expected: str) -> None:
        """New images and a new commit reach Argo CD a moment apart, and what it makes of one without the other is a run that nobody
        asked for: remove it if it was made since this `make up` began and has not ended."""
        jobs = client.CustomObjectsApi(api)
        namespace = status.namespace(ENVIRONMENT)
        for run in status.runs(api, ENVIRONMENT, self.layout):
            if run.name != expected and run.created > self.began and run.job not in ("SUCCEEDED", "FAILED", "STOPPED"):
                jobs.delete_namespaced_custom_object(*status.RAY, namespace, "rayjobs", run.name)

    def expected_run(self) -> str:
        """Id of the run that the deployed commit asks for with this machine's images."""
        repository = registry.git_repository(self.layout, self.settings)
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in environments.ORDER]
            for file in files:
                file.write_text(shell.output(["git", "-C", repository, "show",
                                              f"{registry.BRANCH}:environments/{ENVIRONMENT}/{file.name}"]))
            return runid.of_values(files, {"global": {"images": self.site().images}})

    def chatbot(self, say: Say) -> bool:
        """Wait until the chatbot answers with the newest run's model."""
        deadline = time.monotonic() + 600
        waited = False
        while status.served_run(self.settings) != status.newest_run(self.layout):
            waited = True
            say("loading the model")
            if time.monotonic() > deadline:
                raise OperatorError("The chatbot was not ready within 10 minutes. See `kubectl logs deployment/llm-finetune-chatbot`.")
            time.sleep(1.0)
        return waited


def up(layout: Layout, settings: Settings) -> None:
    """Everything, with progress; ends with what to open and type next."""
    plan = site.kept(layout)
    if plan is not None and plan.server:
        raise OperatorError("This server belongs to a cluster of `make site-up`; `make site-down` takes it out.")
    preflight.check(preflight.problems(layout, settings))
    begin = time.monotonic()
    steps.run(layout, Up(layout, settings).steps())
    print(status.text(kubernetes.api_client(layout), layout, settings))
    print(f"""
Up in {clock(time.monotonic() - begin)}. Next:
  open       http://localhost:{settings.chatbot_port}   (chatbot)   http://localhost:{settings.dashboard_port}   (Ray dashboard)
  ask        make ask Q="Does aspirin prevent heart attacks?"
  numbers    make results
  retrain    git remote add local {registry.git_repository(layout, settings)}
             edit environments/local/finetune.yaml (say, learning_rate), git commit, git push local HEAD:main
  kubectl    export KUBECONFIG={layout.kubeconfig} PATH={layout.bin}:$PATH""")
