"""Values that helm must refuse, each with a message that names the value and what to do."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import pytest

from tests.charts.conftest import CHATBOT, GPU, JOB, RUN, Values, helm, join, refusal
from tools import charts


def nfs(**values: Any) -> Values:
    return {"nfs-provisioner": {"mode": "external", "external": {"server": "nfs"}, **values}}


def server(**values: Any) -> Values:
    given = {"namespace": "storage", "nodeName": "n", "hostPath": "/data", "clusterIP": "10.96.0.9", "clients": ["10.0.0.0/24"], **values}
    return {"nfs-provisioner": {"mode": "inCluster", "inCluster": given}}


def group(**values: Any) -> Values:
    return {"ray-cluster": {"workerGroups": [{"name": "g", **values}]}}


def run(**values: Any) -> Values:
    return {"finetune-job": {"enabled": True, "run": {**RUN, **values}}}


def chat(config: dict[str, Any] | None = None, **values: Any) -> Values:
    return join(CHATBOT, {"chatbot": {**({"config": config} if config else {}), **values}})


VLLM = {"enabled": True}
PLUGIN: Values = {"nvidia-device-plugin": {"enabled": True, "namespace": "gpu"}}

REFUSED: dict[str, tuple[Values, list[str]]] = {
    # schema
    "unknown key": ({"ray-cluster": {"heads": 2}}, ["ray-cluster", "'heads' not allowed"]),
    "unknown global key": ({"global": {"image": {}}}, ["/global", "'image' not allowed"]),
    "unknown part": ({"ray_cluster": {}}, ["'ray_cluster' not allowed"]),
    "wrong type": ({"kuberay-operator": {"replicas": "two"}}, ["kuberay-operator", "/replicas", "got string, want integer"]),
    "bad enum": ({"nfs-provisioner": {"mode": "nfs"}}, ["/mode", "existingClaim", "external", "inCluster", "nodePath"]),
    "digest without sha256": ({"global": {"images": {"trainer": {"digest": "a" * 64}}}}, ["/global/images/trainer/digest", "sha256:"]),
    "short digest": ({"global": {"images": {"chatbot": {"digest": "sha256:abc"}}}}, ["/global/images/chatbot/digest"]),
    "node port out of range": ({"ray-cluster": {"head": {"dashboard": {"nodePort": 8265}}}}, ["/head/dashboard/nodePort"]),
    "negative replicas": (group(replicas=-1), ["/workerGroups/0/replicas", "minimum"]),
    "group without name": ({"ray-cluster": {"workerGroups": [{"gpus": 1}]}}, ["/workerGroups/0", "name"]),
    "unknown key of a group": (group(gpu=1), ["/workerGroups/0", "'gpu' not allowed"]),
    "memory without sense": (group(memory="8 GB"), ["/workerGroups/0/memory"]),
    "missing secret name": ({"ray-cluster": {"secretEnv": [{"name": "HF_TOKEN", "key": "token"}]}}, ["/secretEnv/0", "secretName"]),
    "empty secret name": ({"ray-cluster": {"secretEnv": [{"name": "HF_TOKEN", "secretName": "", "key": "token"}]}},
                          ["/secretEnv/0/secretName"]),
    "missing mounted secret": (chat(secrets=[{"mountPath": "/secrets"}]), ["/secrets/0", "secretName"]),
    "cluster name too long": ({"global": {"rayCluster": {"name": "c" * 54}}}, ["/global/rayCluster/name"]),
    "relative mount path": ({"global": {"storage": {"mountPath": "storage"}}}, ["/global/storage/mountPath"]),
    # the run, by the trainer's schema
    "unknown field of the run": (run(trian={}), ["/run", "'trian' not allowed"]),
    "negative batch": (run(train={"micro_batch_tokens": -1}), ["/run/train/micro_batch_tokens", "minimum"]),
    "wrong type in the run": (run(seed="seventeen"), ["/run/seed", "got string, want integer"]),
    "run without model": ({"finetune-job": {"enabled": True, "run": {"name": "x", "data": {"sample": True}}}}, ["/run", "model"]),
    "unknown method": (run(method={"kind": "dora"}), ["/run/method/kind", "lora"]),
    "no workers": (join(JOB, {"finetune-job": {"resources": {"workers": 0}}}), ["/resources/workers", "minimum"]),
    "unknown chatbot setting": (chat({"engine": {"stream": 1}}), ["/config/engine", "'stream' not allowed"]),
    # finetune-job
    "run name too long": (run(name="x" * 37), ["finetune-job.run.name", "47", "at most 36"]),
    "enabled without a run": ({"finetune-job": {"enabled": True}}, ["finetune-job.run is empty", "finetune-job.enabled: false"]),
    "null in the run": (run(model={"path": "m", "architecture": {"a": [{"b": None}]}}),
                        ["finetune-job.run.model.architecture.a[0].b is null"]),
    "GPUs without a GPU site": (join(JOB, {"finetune-job": {"resources": {"gpus_per_worker": 1}}}),
                                ["finetune-job.resources.gpus_per_worker", "global.gpu.available: true"]),
    "secret in the environment": (join(JOB, {"finetune-job": {"env": {"HF_TOKEN": "x"}}}),
                                  ["finetune-job.env.HF_TOKEN", "ray-cluster.secretEnv"]),
    "shell in the environment": (join(JOB, {"finetune-job": {"env": {"A": "$(id)"}}}), ["finetune-job.env.A", "shell"]),
    "own configuration variable": (join(JOB, {"finetune-job": {"env": {"LLM_FINETUNE_CONFIG": "x"}}}),
                                   ["LLM_FINETUNE_CONFIG", "finetune-job.run"]),
    "Kueue on the standing cluster": (join(JOB, {"finetune-job": {"kueue": {"queue": "q"}}}),
                                      ["finetune-job.kueue.queue", "global.rayCluster.standing: false", "ray-cluster.kueue.queue"]),
    "more workers than pods": (join(JOB, {"finetune-job": {"resources": {"workers": 2}}}),
                               ["asks for 2 workers of 1 CPUs and 0 GPUs", "room for 1", "Raise replicas", "resources.workers"]),
    "workers larger than pods": (join(JOB, {"finetune-job": {"resources": {"cpus_per_worker": 2}}}), ["1 workers of 2 CPUs", "room for 0"]),
    "fewer GPUs than workers": (join(JOB, GPU, group(replicas=3, gpus=1, cpus=8),
                                     {"finetune-job": {"resources": {"workers": 4, "gpus_per_worker": 1}}}), ["and 1 GPUs", "room for 3"]),
    "fewest workers beyond the pods": (join(JOB, group(replicas=2), {"finetune-job": {"resources": {"workers": 4, "min_workers": 3}}}),
                                       ["asks for 3 workers", "room for 2"]),
    "own clusters without a shape": (join(JOB, {"global": {"rayCluster": {"standing": False}}, "ray-cluster": {"enabled": False}}),
                                     ["ray-cluster.enabled is false", "Set ray-cluster.enabled: true"]),
    # ray-cluster
    "no worker groups": ({"ray-cluster": {"workerGroups": []}}, ["ray-cluster.workerGroups is empty"]),
    "two groups of one name": ({"ray-cluster": {"workerGroups": [{"name": "g"}, {"name": "g"}]}}, ["two groups named g"]),
    "group GPUs without a GPU site": (group(gpus=1), ["ray-cluster.workerGroups[g].gpus is 1", "global.gpu.available: true"]),
    "more shared memory than memory": (group(memory="1Gi", shmSize="2Gi"), ["workerGroups[g].shmSize (2Gi)", "Raise memory"]),
    "object store beyond shared memory": (group(objectStoreMemory="3Gi"), ["workerGroups[g].objectStoreMemory (3Gi)", "Raise shmSize"]),
    "object store too small": (group(objectStoreMemory="50Mi"), ["workerGroups[g].objectStoreMemory (50Mi)", "75Mi"]),
    "object store of the head": ({"ray-cluster": {"head": {"memory": "256Mi"}}},
                                 ["ray-cluster.head.objectStoreMemory", "ray-cluster.head.memory"]),
    "replicas below the minimum": (group(replicas=1, minReplicas=2, maxReplicas=3), ["workerGroups[g].replicas (1)", "minReplicas (2)"]),
    "minimum above maximum": (group(replicas=2, minReplicas=3, maxReplicas=1), ["workerGroups[g].minReplicas (3)"]),
    "host network under restricted": (group(network={"hostNetwork": True}),
                                      ["workerGroups[g].network.hostNetwork", "global.podSecurity.level: privileged"]),
    "locked memory under restricted": (group(network={"rdma": {"resourceName": "rdma/hca", "ipcLock": True}}),
                                       ["workerGroups[g].network.rdma.ipcLock", "global.podSecurity.level: privileged"]),
    "host path under restricted": (group(scratch={"kind": "hostPath", "hostPath": "/nvme"}),
                                   ["workerGroups[g].scratch.kind", "global.podSecurity.level: privileged"]),
    "host path without a path": (join({"global": {"podSecurity": {"level": "privileged"}}}, group(scratch={"kind": "hostPath"})),
                                 ["workerGroups[g].scratch.hostPath is empty"]),
    # nfs-provisioner
    **{f"mount option {option}": (nfs(mountOptions=["hard", "nfsvers=4.1", option]), ["nfs-provisioner.mountOptions", option, "Remove it"])
       for option in ("soft", "softerr", "nolock", "local_lock=all", "async", "nconnect=8", "sec=krb5")},
    "options in one string": (nfs(mountOptions=["hard,soft", "nfsvers=4.1"]), ["nfs-provisioner.mountOptions", "soft"]),
    "NFS 3": (nfs(mountOptions=["hard", "nfsvers=3"]), ["nfs-provisioner.mountOptions", "nfsvers=3", "Use nfsvers=4.1"]),
    "NFS 4.0": (nfs(mountOptions=["hard", "vers=4.0"]), ["vers=4.0", "Use nfsvers=4.1"]),
    "not hard": (nfs(mountOptions=["nfsvers=4.1"]), ["nfs-provisioner.mountOptions lacks hard"]),
    "external without server": ({"nfs-provisioner": {"mode": "external"}}, ["nfs-provisioner.external.server is empty"]),
    "external path that leads out": (nfs(external={"server": "nfs", "path": "/export/../etc"}),
                                     ["nfs-provisioner.external.path", "without it"]),
    "dynamic, driver unknown": (nfs(external={"server": "nfs", "provisioning": "dynamic"}),
                                ["nfs-provisioner.external.driverVersion is empty", "4.13.4", "csi-nfs-controller"]),
    "dynamic, driver with path traversal": (nfs(external={"server": "nfs", "provisioning": "dynamic", "driverVersion": "v4.13.1"}),
                                            ["driverVersion is v4.13.1", "CVE-2026-3864", "4.13.4 or later"]),
    "world export": (server(clients=["10.0.0.0/24", "0.0.0.0/0"]), ["nfs-provisioner.inCluster.clients has 0.0.0.0/0", "10.0.0.0/24"]),
    "world export, IPv6": (server(clients=["::/0"]), ["nfs-provisioner.inCluster.clients has ::/0"]),
    "wildcard export": (server(clients=["*"]), ["/inCluster/clients/0"]),
    "nobody may mount": (server(clients=[]), ["nfs-provisioner.inCluster.clients is empty"]),
    "server without node": (server(nodeName=""), ["nfs-provisioner.inCluster.nodeName is empty"]),
    "server without disk": (server(hostPath=""), ["nfs-provisioner.inCluster.hostPath is empty"]),
    "server without address": (server(clusterIP=""), ["nfs-provisioner.inCluster.clusterIP is empty"]),
    "server in a restricted namespace": (server(namespace=""), ["Set nfs-provisioner.inCluster.namespace"]),
    "node path on two nodes": ({"global": {"nodes": 2}, "nfs-provisioner": {"mode": "nodePath", "nodePath": {"path": "/srv"}}},
                               ["nfs-provisioner.mode is nodePath", "global.nodes: 2", "mode: external or inCluster"]),
    "node path without a path": ({"nfs-provisioner": {"mode": "nodePath"}}, ["nfs-provisioner.nodePath.path is empty"]),
    # nvidia-device-plugin
    "plugin without a GPU site": (PLUGIN, ["nvidia-device-plugin.enabled", "global.gpu.available: true"]),
    "plugin in a restricted namespace": (join(GPU, {"nvidia-device-plugin": {"enabled": True}}), ["Set nvidia-device-plugin.namespace"]),
    "runtime class without a name": (join(GPU, PLUGIN, {"nvidia-device-plugin": {"createRuntimeClass": True, "runtimeClassName": ""}}),
                                     ["nvidia-device-plugin.createRuntimeClass", "runtimeClassName"]),
    "MPS on MIG": (join(GPU, PLUGIN, {"nvidia-device-plugin": {"migStrategy": "single", "sharing": {"kind": "mps", "rename": False}}}),
                   ["nvidia-device-plugin.sharing.kind is mps", "timeSlicing"]),
    "shares under another name": (join(GPU, PLUGIN, {"nvidia-device-plugin": {"sharing": {"kind": "timeSlicing"}}}),
                                  ["nvidia-device-plugin.sharing.rename", "global.gpu.resourceName: nvidia.com/gpu.shared"]),
    # chatbot
    "chatbot without a run": ({"chatbot": {"enabled": True}}, ["chatbot.config.serve.run is empty", "follow: latest"]),
    "run and follow": (chat({"serve": {"follow": "latest"}}), ["chatbot.config.serve.follow: latest", "follow: none"]),
    "chatbot GPUs without a GPU site": (chat(gpus=1), ["chatbot.gpus is 1", "global.gpu.available: true"]),
    "vLLM without a GPU site": (chat(vllm=VLLM), ["chatbot.vllm.enabled is true", "global.gpu.available: true"]),
    "vLLM and GPUs of the chatbot": (join(GPU, chat(vllm=VLLM, gpus=1)), ["chatbot.gpus is 1", "chatbot.gpus: 0"]),
    "vLLM that follows": (join(GPU, {"chatbot": {"enabled": True, "vllm": VLLM, "config": {"serve": {"follow": "latest"}}}}),
                          ["chatbot.config.serve.follow is latest", "chatbot.config.serve.run"]),
    "vLLM and the base model": (join(GPU, chat({"serve": {"base": True}}, vllm=VLLM)),
                                ["chatbot.config.serve.base is true", "tuned model alone"]),
    "vLLM and an engine": (join(GPU, chat({"engine": {"url": "http://x/v1"}}, vllm=VLLM)), ["chatbot.config.engine.url", "Leave it out"]),
    "vLLM of no version": (join(GPU, chat(vllm=VLLM)), ["global.images.vllm", "neither a tag nor a digest"]),
    "ingress without host": (chat(ingress={"enabled": True}), ["chatbot.ingress.host is empty"]),
    "node port without its type": (chat(service={"nodePort": 30786}), ["chatbot.service.nodePort is 30786", "type: NodePort"]),
    "bounds of the autoscaler": (chat(autoscaling={"enabled": True, "minReplicas": 5}),
                                 ["chatbot.autoscaling.minReplicas (5)", "maxReplicas (4)"]),
    "sessions of several pods": (chat({"access": {"mode": "users", "users_file": "/secrets/users"}}, replicas=2),
                                 ["chatbot.config.access.session_key_file is empty"]),
    "records outside the storage": (chat({"records": {"directory": "/var/records"}}),
                                    ["chatbot.config.records.directory (/var/records)", "/storage/chatbot"]),
    "port of the chatbot": (chat({"server": {"port": 80}}), ["chatbot.config.server.port", "Leave it out"]),
    "storage of the chatbot": (chat({"storage": "/x"}), ["chatbot.config.storage", "global.storage.mountPath"]),
    # release
    "values of another chart": ({"global": {"release": {"chart": {"version": "9.9.9"}}}}, ["global.release.chart.version is 9.9.9"]),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused(case: str) -> None:
    values, told = REFUSED[case]
    message = refusal(values)
    for part in told:
        assert part in message


MESSAGES: list[tuple[str, str]] = [
    (path.name, message) for path in sorted(charts.CHART.rglob("templates/*"))
    for message in re.findall(r'fail \(?(?:printf )?"((?:[^"\\]|\\.)*)"', path.read_text())]
"""Every message with which a template refuses: (file, format)."""


def test_switched_off_parts_need_no_values() -> None:
    """The run may be empty while nothing is trained, and the served run while nothing is served."""
    assert helm({"finetune-job": {"enabled": False, "run": {}}, "chatbot": {"enabled": False}})[0] == 0


def test_whatever_the_message_it_is_one_paragraph_with_a_remedy() -> None:
    """Messages of the templates end with what to do: a sentence that begins with a verb, after what is wrong."""
    for place, message in MESSAGES:
        assert message.endswith("."), (place, message)
        assert len(re.split(r"(?<=[.:?]) ", message)) >= 2, (place, message)
    assert len(MESSAGES) > 40


def test_an_amount_of_memory_is_refused_without_the_schema_too() -> None:
    """The schemas refuse it first; `helm --skip-schema-validation` must not read 8 GB as 0."""
    done = subprocess.run([charts.helm(), "template", "--skip-schema-validation", "site", str(charts.CHART), "--values", "-"],
                          input=json.dumps(group(memory="8 GB")), capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "8 GB is not an amount of memory" in done.stderr


@pytest.mark.parametrize(("place", "message"), [m for m in MESSAGES if "is not an amount of memory" not in m[1]],
                         ids=lambda text: text[:60])
def test_every_refusal_is_provoked(place: str, message: str) -> None:
    """A `fail` that none of the values above reaches is not tested: it could be unreachable, or a template error of its own."""
    pattern = re.compile(".*?".join(re.escape(part) for part in re.split(r"%[-.0-9]*[a-z]", message.replace(r"\"", '"'))))
    assert any(pattern.search(refusal(values)) for values, _ in REFUSED.values()), f"{place}: {message}"


@pytest.mark.parametrize("values", [
    join(group(replicas=2, maxReplicas=4),
         {"ray-cluster": {"autoscaling": {"enabled": True}}, "finetune-job": {"resources": {"workers": 4}}}),
    join(group(replicas=2), {"finetune-job": {"resources": {"workers": 4, "min_workers": 2}}}),
    join({"ray-cluster": {"workerGroups": [{"name": "a", "cpus": 2}, {"name": "b"}]}}, {"finetune-job": {"resources": {"workers": 3}}}),
    group(cpus=1) | {"finetune-job": {"resources": {"workers": 10, "cpus_per_worker": 0.1}}},
    {"ray-cluster": {"enabled": False}, "finetune-job": {"resources": {"workers": 99}}},
], ids=["the autoscaler's most", "fewer are enough", "groups of unequal size", "shares of a core", "somebody else's cluster"])
def test_room_is_not_refused(values: Values) -> None:
    code, _, err = helm(join(JOB, values))
    assert code == 0, err
