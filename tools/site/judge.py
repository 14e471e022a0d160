"""What of the measurements is wrong, and how to mend it; whether the planned run can go on this site."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from trainer.errors import ConfigError
from trainer.plan.hardware import find

SKEW_S = 1.0
FSYNC_P99_MS = 500.0
SLOW_GPU = 0.9
"""Share of its fellows' speed under which a GPU is called slow."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (`stop`: the run cannot go; `warn`: it goes, worse than it could) or was looked at and is well (`ok`)."""

    level: Literal["stop", "warn", "ok"]
    area: str
    what: str
    mend: str = ""


def judge(result: dict[str, Any]) -> list[Finding]:
    """All findings, the worst first."""
    found = [*nodes(result), *gpus(result), *storage(result), *network(result), *clocks(result), *plan(result)]
    return sorted(found, key=lambda f: ("stop", "warn", "ok").index(f.level))


def size(value: float) -> str:
    """Bytes in 10^9."""
    return f"{value / 1e9:,.1f} GB" if value >= 1e8 else f"{value / 1e6:,.1f} MB"


def _running(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [p for p in result["pods"] if p["running"]]


def nodes(result: dict[str, Any]) -> Iterator[Finding]:
    for node in result["nodes"]:
        if node["group"] and not node["ready"]:
            yield Finding("warn", "nodes", f"{node['name']} takes no pods: {node['why']}", "kubectl describe node; the others are checked.")
    for group in result["groups"]:
        mine = [n for n in result["nodes"] if n["group"] == group["name"]]
        fits = sum(n["fits"] for n in mine if n["ready"])
        wants = f"{group['replicas']} workers" + (f" of {group['gpus']} GPUs" if group["gpus"] else "")
        if not mine:
            chosen = ", ".join(f"{k}={v}" for k, v in group["selector"].items()) or "any label"
            yield Finding("stop", "nodes", f"No node takes the group {group['name']} ({chosen}).",
                          "Label the nodes as ray-cluster.workerGroups says, tolerate their taints, and see that the device plugin runs.")
        elif fits < group["replicas"]:
            yield Finding("stop", "nodes", f"The group {group['name']} asks for {wants}; its nodes ({len(mine)}) have room for {fits}.",
                          "Lower replicas, gpus, cpus or memory of the group, or add nodes.")
        else:
            names = ", ".join(n["name"] for n in mine if n["ready"])
            yield Finding("ok", "nodes", f"Group {group['name']}: {group['replicas']} workers wanted, room for {fits} on {names}.")
    for pod in result["pods"]:
        if not pod["running"]:
            yield Finding("stop", "nodes", f"No pod of the trainer image runs on {pod['node']}: {pod['why'] or 'not started in time'}",
                          _mend_pod(pod["why"]))
        elif error := pod["facts"].get("error") if not pod["facts"].get("cpus") else "":
            yield Finding("stop", "nodes", f"The measurements do not run on {pod['label']}: {error}",
                          "pods/exec must be allowed to you in the namespace.")
        elif pod["pull_seconds"]:
            rate = f", {pod['image_bytes'] / pod['pull_seconds'] / 1e6:,.0f} MB/s" if pod["image_bytes"] else ""
            yield Finding("ok", "image", f"{pod['label']}: image pulled in {pod['pull_seconds']:.0f} s{rate}.")
        else:
            yield Finding("ok", "image", f"{pod['label']}: image on the node, pod running after {pod['start_seconds']:.1f} s.")


def _mend_pod(why: str) -> str:
    for word, mend in (("pull", "Name an image that the node can pull: global.images.trainer, global.imagePullSecrets."),
                       ("persistentvolumeclaim", "Install the environment first (finetune-job.enabled: false keeps it from training)."),
                       ("mount", "docs/site-preparation.md, section 3: export, NFS client of the node, mount options."),
                       ("PodSecurity", "Label the namespace as global.podSecurity.level says."),
                       ("Insufficient", "Free the node, or ask for less.")):
        if word.lower() in why.lower():
            return mend
    return "kubectl describe pod and kubectl logs tell more."


def gpus(result: dict[str, Any]) -> Iterator[Finding]:
    asked = {g["name"]: g for g in result["groups"]}
    if not any(g["gpus"] for g in result["groups"]):
        yield Finding("ok", "gpus", "The groups ask for no GPUs: training is on CPUs, and there is nothing to check.")
        return
    rates: dict[str, list[tuple[str, float]]] = {}
    for node in result["nodes"]:
        if node["group"] and asked[node["group"]]["gpus"] and node["gpus_used"]:
            yield Finding("warn", "gpus", f"{node['gpus_used']} GPUs of {node['name']} are held by other pods and were not checked.",
                          "Run the check before the Ray cluster starts (docs/site-preparation.md, section 7).")
    for pod in _running(result):
        if not pod["gpus"]:
            continue
        facts, cuda, where = pod["facts"], pod.get("cuda") or {}, pod["label"]
        if len(facts.get("gpus", [])) != pod["gpus"]:
            yield Finding("stop", "gpus", f"{where}: {pod['gpus']} GPUs were given, {len(facts.get('gpus', []))} are seen"
                          f" ({facts.get('error', 'no reason is told')}).",
                          "The container runtime does not hand them in: set runtimeClassName (K3s: nvidia), or make it the default.")
        if error := cuda.get("error"):
            yield Finding("stop", "gpus", f"{where}: PyTorch for CUDA {cuda.get('cuda')} cannot use driver {facts.get('driver')} "
                          f"(CUDA {facts.get('cuda_driver')}): {error}", "Update the driver: 580 or later for CUDA 13.")
        for number, gpu in enumerate(facts.get("gpus", [])):
            yield from _health(f"{where}, GPU {number} ({gpu['name']})", gpu)
        for number, device in enumerate(cuda.get("devices", [])):
            name = f"{where}, GPU {number} ({device['name']})"
            if not device["supported"]:
                yield Finding("stop", "gpus", f"{name}: the image has no code for compute capability {device['capability']}.",
                              "Leave this GPU out (nodeSelector), or build the image with a PyTorch for it.")
            elif "error" in device or not device.get("finite", True):
                yield Finding("stop", "gpus", f"{name}: a matrix product failed: {device.get('error', 'the result is not finite')}",
                              "Drain the node and have the GPU looked at (nvidia-smi -q, dcgmi diag -r 3).")
            else:
                rates.setdefault(device["name"], []).append((name, device["tflops"]))
                if device["slowed"]:
                    yield Finding("warn", "gpus", f"{name} is slowed down: {', '.join(device['slowed'])}.",
                                  "Cooling and power of the server.")
    for kind, measured in rates.items():
        middle = statistics.median(r for _, r in measured)
        for name, rate in measured:
            if rate < SLOW_GPU * middle:
                yield Finding("warn", "gpus", f"{name}: {rate:.0f} TFLOP/s, its fellows {middle:.0f}. It holds all others up.",
                              "Clocks, power limit, cooling, PCIe seat (nvidia-smi -q -d CLOCK,POWER,PERFORMANCE).")
        yield Finding("ok", "gpus", f"{len(measured)} x {kind}: {min(r for _, r in measured):.0f} to {max(r for _, r in measured):.0f} "
                      "TFLOP/s in bf16 matrix products.")


def _health(name: str, gpu: dict[str, Any]) -> Iterator[Finding]:
    if gpu.get("rows_failed"):
        yield Finding("stop", "gpus", f"{name}: remapping of damaged memory rows failed.", "Replace the GPU.")
    if gpu.get("ecc_uncorrected"):
        yield Finding("stop", "gpus", f"{name}: {gpu['ecc_uncorrected']} uncorrected memory errors since the driver was loaded.",
                      "Drain the node and reset the GPU; if they come back, replace it.")
    if gpu.get("rows_pending"):
        yield Finding("warn", "gpus", f"{name}: memory rows wait to be remapped.", "Drain the node and reset the GPU.")
    if gpu.get("mig"):
        yield Finding("warn", "gpus", f"{name}: MIG is on; a slice has neither NVLink nor the whole memory.",
                      "nvidia-smi -mig 0 for training.")
    if (pcie := gpu.get("pcie")) and pcie[0] and pcie[0] < pcie[1]:
        yield Finding("warn", "gpus", f"{name}: PCIe x{pcie[0]} of x{pcie[1]}.", "Seat of the card, riser, BIOS setting of the slot.")
    limit, default = gpu.get("power_limit_w"), gpu.get("power_default_w")
    if limit and default and limit < 0.9 * default:
        yield Finding("warn", "gpus", f"{name}: power is limited to {limit:.0f} W of {default:.0f} W.",
                      "nvidia-smi -pl, if it is not meant.")


def storage(result: dict[str, Any]) -> Iterator[Finding]:
    measured = result["storage"]
    pods = {p["label"]: p.get("storage", {}) for p in _running(result)}
    for label, found in pods.items():
        if error := found.get("error"):
            yield Finding("stop", "storage", f"{label} cannot use the storage: {error}",
                          "The directory must belong to global.podSecurity.runAsUser (1000) and be writable: "
                          "docs/site-preparation.md, section 3.")
        elif found and not found.get("read_whole", True):
            yield Finding("stop", "storage", f"{label} reads other bytes than another pod wrote.",
                          "Mount options (hard, nfsvers=4.1), server's async export, network cards with broken offload.")
        elif found.get("fsync_p99_ms", 0) > FSYNC_P99_MS:
            yield Finding("warn", "storage", f"{label}: one fsync in a hundred takes {found['fsync_p99_ms']:.0f} ms or more.",
                          "A server without a write cache that survives a power cut, or one that is busy.")
    good = {k: v for k, v in pods.items() if "write_mb_s" in v and "read_mb_s" in v}
    if good:
        together = measured.get("write_together_mb_s")
        yield Finding("ok", "storage", f"Write {_span([v['write_mb_s'] for v in good.values()])} MB/s"
                      + (f" ({together:,.0f} all at once)" if together else "")
                      + f", read {_span([v['read_mb_s'] for v in good.values()])} MB/s, fsync "
                      f"{_span([v['fsync_ms'] for v in good.values()], 1)} ms median, "
                      f"{_span([v['fsync_p99_ms'] for v in good.values()], 1)} ms p99.")
    for name, text in (("renames", "rename"), ("locks", "locks"), ("races", "hard links")):
        for side in measured.get(name, []):
            if "error" in side:
                yield Finding("stop", "storage", f"The check of {text} between two pods failed: {side['error']}",
                              "Both pods must see the same directory: one ReadWriteMany volume, no cache between (actimeo, fscache).")
    if measured.get("renames") and not any("error" in s for s in measured["renames"]):
        written, seen = measured["renames"]
        if seen["torn"] or seen["missing"]:
            yield Finding("stop", "storage", f"A file that is replaced by rename was seen torn {seen['torn']} times and missing "
                          f"{seen['missing']} times: checkpoints would be too.",
                          "A file system with atomic rename: NFS 4.1, not SMB, FUSE or S3 mounts.")
        else:
            yield Finding("ok", "storage", f"Rename is atomic between pods: {written['renames']} replacements, {seen['whole']} reads, "
                          "all whole" + (f" ({seen['stale']} stale handles)." if seen["stale"] else "."))
    if measured.get("locks") and not any("error" in s for s in measured["locks"]):
        tried = measured["locks"][1]
        if not (tried["lock_refused"] and tried["flock_refused"] and tried["released"]):
            names = {"lock_refused": "the run's lock", "flock_refused": "flock", "released": "release"}
            bad = [name for key, name in names.items() if not tried[key]]
            yield Finding("stop", "storage", f"Two pods can hold the same lock ({', '.join(bad)}).",
                          "Mount without nolock and local_lock; NFS 4.1; lock manager of the server.")
        else:
            yield Finding("ok", "storage", "Locks hold between pods; a new file is seen by the other after "
                          f"{tried['seen_after_s']:.1f} s at most.")
    if measured.get("races") and not any("error" in s for s in measured["races"]):
        won = sorted(measured["races"][0]["won"] + measured["races"][1]["won"])
        if won != list(range(measured["races"][0]["rounds"])):
            yield Finding("stop", "storage", "Two pods made the same hard link, or none did: a lock would have two owners.",
                          "A file system with exclusive link(2): NFS 4.1.")


def _span(values: list[float], digits: int = 0) -> str:
    low, high = (f"{v:,.{digits}f}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def network(result: dict[str, Any]) -> Iterator[Finding]:
    pairs = result["network"]
    for pair in pairs:
        if "error" in pair:
            yield Finding("stop", "network", f"{pair['from']} does not reach {pair['to']}: {pair['error']}",
                          "CNI, firewall between the nodes, NetworkPolicies of the namespace; ports of the pod network (VXLAN 8472/udp).")
    good = [p for p in pairs if "gbps" in p]
    if good:
        middle = statistics.median(p["gbps"] for p in good)
        for pair in good:
            if pair["gbps"] < 0.5 * middle:
                yield Finding("warn", "network",
                              f"{pair['from']} to {pair['to']}: {pair['gbps']:.1f} Gbit/s, the other pairs {middle:.1f}.",
                              "Cable, port speed (ethtool), MTU, a bond that uses one link; the slowest node sets the pace.")
        yield Finding("ok", "network", f"TCP {_span([p['gbps'] for p in good], 1)} Gbit/s, round trip "
                      f"{_span([p['latency_us'] for p in good])} µs ({len(good)} directions"
                      + (", pods of one node)." if result["one_node"] else ")."))
    mtus = {card["mtu"] for p in _running(result) for card in p["facts"].get("cards", []) if card["name"] == "eth0"}
    if len(mtus) > 1:
        yield Finding("warn", "network", f"The pods' MTUs differ: {sorted(mtus)}.",
                      "One MTU for all nodes, or large packets are lost or cut.")
    for collective in result["collectives"]:
        if error := collective.get("error"):
            yield Finding("stop", "network", f"All-reduce over {collective['over']} failed: {error}",
                          "NCCL_DEBUG=INFO in the group's env; network.interface; RDMA resource; ports between the pods.")
        else:
            yield Finding("ok", "network", f"All-reduce ({collective['backend']}) over {collective['over']}: "
                          f"{collective['gbps']:.1f} Gbit/s bus bandwidth.")


def clocks(result: dict[str, Any]) -> Iterator[Finding]:
    ahead = {p["to"]: p["ahead_s"] for p in result["network"] if "ahead_s" in p and p["from"] == result["pods"][0]["label"]}
    off = {name: value for name, value in ahead.items() if abs(value) > SKEW_S}
    for name, value in off.items():
        yield Finding("warn", "clocks", f"The clock of {name} is {abs(value):.1f} s {'ahead of' if value > 0 else 'behind'} that of "
                      f"{result['pods'][0]['label']}.", "chrony or systemd-timesyncd on the nodes.")
    if ahead and not off:
        yield Finding("ok", "clocks", f"Clocks agree within {max(abs(v) for v in ahead.values()) * 1e3:.1f} ms.")


def plan(result: dict[str, Any]) -> Iterator[Finding]:
    found, real = result["plan"], result.get("plan_measured") or {}
    if not found:
        yield Finding("warn", "run", "The environment describes no run, so nothing is compared with its needs.",
                      "finetune-job.enabled: true with a run, in environments/<env>/finetune.yaml.")
        return
    if error := found.get("error"):
        yield Finding("stop", "run", f"The run cannot be planned: {error}", "python -m trainer plan says the same.")
        return
    run = found["run"]
    if found["fits"] is False:
        short = [g["name"] for g in found["groups"] if g["fits"] is False]
        yield Finding("stop", "run", f"{run} does not fit the GPU memory of {', '.join(short)}.",
                      "python -m trainer plan says what to change.")
    yield from _workers(result, found)
    yield from _kinds(result, found)
    yield from _room(result, found)
    stated, measured = found["network_gbps"], result.get("measured_gbps", 0.0)
    if found["nodes"] > 1 and measured:
        steps = ""
        if real.get("step_seconds"):
            steps = f" A step then takes {real['step_seconds']:.2f} s" + (
                f" instead of {found['step_seconds']:.2f} s." if found["step_seconds"] else ".")
        if stated and measured < 0.7 * stated:
            yield Finding("warn", "run", f"The plan counts on {stated:g} Gbit/s between nodes; {measured:.1f} are there.{steps}",
                          "docs/network.md: host network or RDMA, another sharding; or say the truth in resources.network_gbps.")
        else:
            yield Finding("ok", "run", f"{measured:.1f} Gbit/s between nodes"
                          + (f", the plan counts on {stated:g}." if stated else f".{steps}"))


def _workers(result: dict[str, Any], found: dict[str, Any]) -> Iterator[Finding]:
    gpus_there = sum(g["gpus"] * g["replicas"] for g in result["groups"])
    cpus_there = sum(g["cpus"] * g["replicas"] for g in result["groups"])
    if found["workers_gpus"] > gpus_there:
        yield Finding("stop", "run", f"{found['run']} wants {found['workers_gpus']:g} GPUs; the groups have {gpus_there}.",
                      "resources.workers of the run, or replicas and gpus of ray-cluster.workerGroups.")
    elif found["workers_cpus"] > cpus_there:
        yield Finding("stop", "run", f"{found['run']} wants {found['workers_cpus']:g} CPU cores; the groups give out {cpus_there:g}.",
                      "resources.cpus_per_worker of the run, or cpus of ray-cluster.workerGroups.")
    else:
        yield Finding("ok", "run", f"{found['run']}: {found['workers']} workers, for which the groups have room.")


def _kinds(result: dict[str, Any], found: dict[str, Any]) -> Iterator[Finding]:
    """GPU types as planned and as found, by group; a plan without groups means all."""
    planned = {g["name"]: g for g in found["groups"]}
    told = set()
    for pod in _running(result):
        group = planned.get(pod["group"]) or planned.get("all")
        for device in (pod.get("cuda") or {}).get("devices", []):
            if not group or not group["gpu"] or (pod["group"], device["name"]) in told:
                continue
            told.add((pod["group"], device["name"]))
            try:
                kind = find(device["name"]).name
            except ConfigError:
                kind = ""
            if kind and kind != group["gpu"]:
                yield Finding("warn", "run", f"The plan takes {pod['group']} for {group['gpu']}; {pod['label']} has {kind}.",
                              "resources.gpu or resources.groups of the run, nodeSelector of the group.")
            if group["gpu_memory_bytes"] and device["memory_bytes"] < 0.98 * group["gpu_memory_bytes"]:
                yield Finding("stop" if found["fits"] else "warn", "run",
                              f"The plan counts on {size(group['gpu_memory_bytes'])} of GPU memory; "
                              f"{pod['label']} has {size(device['memory_bytes'])}.", "resources.memory_gb of the run.")


def _room(result: dict[str, Any], found: dict[str, Any]) -> Iterator[Finding]:
    free = min((p["storage"]["free_bytes"] for p in _running(result) if "free_bytes" in p.get("storage", {})), default=None)
    if free is not None:
        need = found["storage_bytes"]
        yield Finding("stop" if free < need else "ok", "run",
                      f"The storage has {size(free)} free; checkpoints and model need {size(need)}.",
                      "Make room, or keep fewer: checkpoint.keep_last, keep_best of the run." if free < need else "")
    rate = result["storage"].get("write_together_mb_s")
    if rate:
        seconds = found["checkpoint_bytes"] / 1e6 / rate
        late = seconds > found["every_minutes"] * 60
        yield Finding("warn" if late else "ok", "run", f"A checkpoint of {size(found['checkpoint_bytes'])} takes {seconds:.0f} s to write, "
                      f"in the background, every {found['every_minutes']:g} minutes.",
                      "A checkpoint more rarely (checkpoint.every_minutes), or a faster storage." if late else "")
    least = min((p["facts"]["memory_bytes"] for p in _running(result) if "memory_bytes" in p["facts"]), default=None)
    if least is not None and least < found["host_bytes"]:
        yield Finding("stop", "run",
                      f"Checkpoints and offload need {size(found['host_bytes'])} of a host's memory; a worker's pod has {size(least)}.",
                      "memory of ray-cluster.workerGroups, or run.engine.offload.")
