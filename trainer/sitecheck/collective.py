"""All-reduce over all pods, as training does it: NCCL with one process a GPU, gloo with one process a pod on CPUs."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import statistics
import time
from typing import Any

PORT = 29614
TIMEOUT = 45.0
"""Seconds until the processes must have met, and a collective must have ended."""


def _rank(rank: int, local: int, world: int, address: str, port: int, gpu: bool, megabytes: int, answer: Any) -> None:
    import torch
    import torch.distributed as dist

    try:
        device = torch.device("cuda", local) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)
        store = dist.TCPStore(address, port, world, is_master=rank == 0, timeout=datetime.timedelta(seconds=TIMEOUT))
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=world,
                                device_id=device if gpu else None, timeout=datetime.timedelta(seconds=TIMEOUT))
        data = torch.full((megabytes * 250_000,), float(rank + 1), dtype=torch.float32, device=device)
        times = []
        for number in range(7):
            dist.barrier(device_ids=[local] if gpu else None)
            begin = time.perf_counter()
            dist.all_reduce(data)
            if gpu:
                torch.cuda.synchronize()
            if number == 0:
                right = bool((data == world * (world + 1) / 2).all())
            times.append(time.perf_counter() - begin)
            data.fill_(1.0)
        dist.destroy_process_group()
        answer.put({"seconds": statistics.median(times[2:]), "right": right})
    except Exception as error:
        answer.put({"error": f"rank {rank}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"})


def all_reduce(first: int, local: int, world: int, address: str, port: int = PORT, gpu: bool = False,
               megabytes: int = 64) -> dict[str, Any]:
    """Take part with ranks `first` to `first + local - 1` of `world`; rank 0 listens on `address:port`.

    Returns the median seconds of an all-reduce of `megabytes` (10^6 bytes) and its bus bandwidth in Gbit/s: 2 (W-1)/W times the data over
    the time, which is what a ring sends through each node's card in one direction. `error` if a process failed or the sum was wrong.
    """
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    processes = [context.Process(target=_rank, args=(first + i, i, world, address, port, gpu, megabytes, answer), daemon=True)
                 for i in range(local)]
    for process in processes:
        process.start()
    found, until = [], time.monotonic() + 2 * TIMEOUT
    while len(found) < local and time.monotonic() < until:
        try:
            found.append(answer.get(timeout=1))
        except Exception:  # queue.Empty
            if not any(p.is_alive() for p in processes) and answer.empty():
                found.append({"error": f"a process ended with {[p.exitcode for p in processes]}"})
                break
    for process in processes:
        process.join(timeout=10)
        if process.is_alive():
            process.kill()
    if errors := [f["error"] for f in found if "error" in f]:
        return {"error": errors[0]}
    if len(found) < local:
        return {"error": f"not done within {2 * TIMEOUT:.0f} s"}
    if not all(f["right"] for f in found):
        return {"error": "the sum is wrong: a network card, a GPU or a driver damages data"}
    seconds = max(f["seconds"] for f in found)
    return {"seconds": seconds, "gbps": 2 * (world - 1) / world * megabytes * 8e6 / seconds / 1e9, "megabytes": megabytes, "world": world,
            "backend": "nccl" if gpu else "gloo", "interface": os.environ.get("NCCL_SOCKET_IFNAME" if gpu else "GLOO_SOCKET_IFNAME", "")}
