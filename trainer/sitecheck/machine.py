"""What a node is, seen from a pod of it: cores, memory, network cards, GPUs with their health, and what CUDA of the image makes of them."""

from __future__ import annotations

import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

THROTTLED = {0x8: "hardware slowdown", 0x20: "too hot (software)", 0x40: "too hot (hardware)", 0x80: "power brake"}
"""NVML's clock event reasons that are no normal state (power capping under load is)."""


def _cards(root: Path = Path("/sys/class/net")) -> list[dict[str, Any]]:
    """Network cards of the pod's network: name, MTU, Mbit/s (0: a virtual one, which has none)."""
    cards = []
    for card in sorted(root.iterdir()):
        def value(name: str, of: Path = card) -> int:
            try:
                return int((of / name).read_text())
            except (OSError, ValueError):
                return 0
        if card.name != "lo":
            cards.append({"name": card.name, "mtu": value("mtu"), "mbit_s": max(0, value("speed"))})
    return cards


def _memory_limit() -> int:
    """Bytes that this pod may use: its cgroup's limit, else the machine's memory."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return min(total, int(text)) if text != "max" else total
    except (OSError, ValueError):
        return total


def gpus() -> dict[str, Any]:
    """Driver and GPUs through NVML (what nvidia-smi shows); `error` if there is no driver or no GPU in this pod."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
    except Exception as error:  # NVMLError, or a missing library
        return {"gpus": [], "error": str(error)}
    driver, cuda = nvml.nvmlSystemGetDriverVersion(), nvml.nvmlSystemGetCudaDriverVersion_v2()

    def ask(read: Any) -> Any:
        try:
            return read()
        except nvml.NVMLError:
            return None  # not every device tells everything (MIG, passthrough, consumer cards)

    found = []
    for index in range(count):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        remapped = ask(lambda h=handle: nvml.nvmlDeviceGetRemappedRows(h))
        found.append({
            "name": ask(lambda h=handle: nvml.nvmlDeviceGetName(h)), "uuid": ask(lambda h=handle: nvml.nvmlDeviceGetUUID(h)),
            "memory_bytes": ask(lambda h=handle: nvml.nvmlDeviceGetMemoryInfo(h).total),
            "memory_used_bytes": ask(lambda h=handle: nvml.nvmlDeviceGetMemoryInfo(h).used),
            "temperature_c": ask(lambda h=handle: nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU)),
            "sm_clock_max_mhz": ask(lambda h=handle: nvml.nvmlDeviceGetMaxClockInfo(h, nvml.NVML_CLOCK_SM)),
            "power_limit_w": ask(lambda h=handle: nvml.nvmlDeviceGetEnforcedPowerLimit(h) / 1000),
            "power_default_w": ask(lambda h=handle: nvml.nvmlDeviceGetPowerManagementDefaultLimit(h) / 1000),
            "ecc_uncorrected": ask(lambda h=handle: nvml.nvmlDeviceGetTotalEccErrors(
                h, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)),
            "rows_pending": None if remapped is None else bool(remapped[2]), "rows_failed": None if remapped is None else bool(remapped[3]),
            "pcie": ask(lambda h=handle: [nvml.nvmlDeviceGetCurrPcieLinkWidth(h), nvml.nvmlDeviceGetMaxPcieLinkWidth(h)]),
            "mig": ask(lambda h=handle: bool(nvml.nvmlDeviceGetMigMode(h)[0])),
        })
    return {"driver": driver, "cuda_driver": f"{cuda // 1000}.{cuda % 1000 // 10}", "gpus": found}


def _supported(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether code for one of the image's architectures runs on a GPU: the same major, and a minor that is not newer."""
    built = [divmod(int(a.removeprefix("sm_").rstrip("af")), 10) for a in architectures if a.startswith("sm_")]
    return any(major == capability[0] and minor <= capability[1] for major, minor in built)


def _burn(index: int, seconds: float) -> dict[str, Any]:
    """bf16 matrix products on one GPU for some seconds: TFLOP/s, and the clock and slowdowns that NVML shows meanwhile."""
    import pynvml as nvml
    import torch

    nvml.nvmlInit()
    device, size = torch.device("cuda", index), 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = a @ b
    torch.cuda.synchronize(device)
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
    except (nvml.NVMLError, AttributeError):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
    rates, clocks, reasons = [], [], 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        begin = time.perf_counter()
        for _ in range(20):
            torch.mm(a, b, out=c)
        try:  # while the products run
            clocks.append(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
            reasons |= nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        except nvml.NVMLError:
            pass
        torch.cuda.synchronize(device)
        rates.append(20 * 2 * size**3 / (time.perf_counter() - begin) / 1e12)
    return {"tflops": statistics.median(rates), "finite": bool(torch.isfinite(c).all()), "sm_clock_mhz": max(clocks, default=0),
            "slowed": [text for bit, text in THROTTLED.items() if reasons & bit]}


def cuda(seconds: float = 2.0) -> dict[str, Any]:
    """What PyTorch of this image makes of the pod's GPUs: its CUDA, the reason why it cannot, a matrix product on each."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": []}
    try:
        torch.cuda.init()
    except Exception as error:  # RuntimeError, AssertionError: no driver, too old a driver, no GPU
        return {**found, "error": str(error).strip().splitlines()[0]}
    architectures = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        device: dict[str, Any] = {"name": properties.name, "capability": f"{capability[0]}.{capability[1]}",
                                  "memory_bytes": properties.total_memory, "supported": _supported(capability, architectures)}
        try:
            found["devices"].append({**device, **_burn(index, seconds)})
        except RuntimeError as error:
            found["devices"].append({**device, "error": str(error).strip().splitlines()[0]})
    return found


def facts() -> dict[str, Any]:
    """The node, without touching its GPUs."""
    return {"kernel": platform.release(), "cpus": len(os.sched_getaffinity(0)), "memory_bytes": _memory_limit(), "cards": _cards(),
            "time": time.time(), **gpus()}
