"""GPU types: what a plan needs to know of them.

Peaks are dense (without sparsity) and from NVIDIA's datasheets and whitepapers; consumer cards with FP32 accumulation, as training
uses it. `memory_gib` is what a process is shown (`torch.cuda.get_device_properties(0).total_memory`), less than the name says.
`efficiency` is the share of the bf16 peak that large matrix products reach inside a training step; `basis` says whether that was
measured (benchmarks/results/), follows from throughput published by others, or is assumed from the card's power and generation.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU type."""

    name: str
    """Key used in `resources.gpu`."""
    memory_gib: float
    """Memory that a process sees, GiB."""
    bf16_tflops: float
    """Dense bf16 peak with FP32 accumulation, 10^12 FLOP/s."""
    fp8_tflops: float
    """Dense FP8 peak, 10^12 FLOP/s; 0 where the hardware has none."""
    bandwidth_gbs: float
    """Memory bandwidth, 10^9 bytes/s."""
    link_gbs: float
    """To other GPUs of the node, 10^9 bytes/s in one direction: NVLink where the usual server has it, else PCIe."""
    pcie_gbs: float
    """To the host, 10^9 bytes/s in one direction."""
    efficiency: float
    """Share of the bf16 peak that large matrix products reach in training."""
    basis: str
    """`measured`, `published` or `assumed`: where `efficiency` comes from."""
    products: tuple[str, ...]
    """Values of the node label nvidia.com/gpu.product that mean this type."""
    source: str
    """Where the figures are from."""

    @property
    def memory(self) -> int:
        """Memory that a process sees, bytes."""
        return int(self.memory_gib * GIB)


GPUS: dict[str, Gpu] = {
    g.name: g
    for g in (
        Gpu("H200", 139.8, 989.4, 1978.9, 4800, 450, 64, 0.70, "measured", ("NVIDIA-H200",),
            "H200 datasheet; efficiency: kernel times of a 16-layer Llama on 1x H200"),
        Gpu("H100-80GB", 79.1, 989.4, 1978.9, 3350, 450, 64, 0.72, "measured", ("NVIDIA-H100-80GB-HBM3",),
            "H100 SXM5 datasheet; efficiency: kernel times of Llama 2 7B on 4x H100"),
        Gpu("H100-PCIE", 79.1, 756.0, 1513.0, 2000, 64, 64, 0.62, "assumed", ("NVIDIA-H100-PCIe",),
            "H100 PCIe datasheet (350 W: lower clocks under load)"),
        Gpu("H100-NVL", 93.1, 835.5, 1671.0, 3938, 300, 64, 0.62, "assumed", ("NVIDIA-H100-NVL",),
            "H100 NVL datasheet; NVLink bridge of two"),
        Gpu("A100-80GB", 79.2, 312.0, 0, 2039, 300, 32, 0.80, "published", ("NVIDIA-A100-SXM4-80GB",),
            "A100 SXM datasheet; efficiency: llm-foundry 64.2% and PyTorch/IBM FSDP 68% MFU on Llama 7B"),
        Gpu("A100-40GB", 39.4, 312.0, 0, 1555, 300, 32, 0.80, "published", ("NVIDIA-A100-SXM4-40GB",),
            "A100 SXM datasheet; efficiency as A100-80GB"),
        Gpu("A100-PCIE-80GB", 79.2, 312.0, 0, 1935, 32, 32, 0.70, "assumed", ("NVIDIA-A100-80GB-PCIe",),
            "A100 PCIe datasheet (300 W: lower clocks under load)"),
        Gpu("A100-PCIE-40GB", 39.4, 312.0, 0, 1555, 32, 32, 0.70, "assumed", ("NVIDIA-A100-PCIE-40GB",), "A100 PCIe datasheet (250 W)"),
        Gpu("L40S", 44.4, 362.0, 733.0, 864, 32, 32, 0.62, "assumed", ("NVIDIA-L40S",), "L40S datasheet; no NVLink"),
        Gpu("L40", 44.4, 181.0, 362.0, 864, 32, 32, 0.70, "assumed", ("NVIDIA-L40",), "L40 datasheet; no NVLink"),
        Gpu("L4", 22.0, 121.0, 242.5, 300, 32, 32, 0.50, "assumed", ("NVIDIA-L4",), "L4 datasheet (72 W: clocks fall under load)"),
        Gpu("A40", 44.4, 149.7, 0, 696, 32, 32, 0.75, "assumed", ("NVIDIA-A40",), "A40 datasheet"),
        Gpu("A10", 22.0, 125.0, 0, 600, 32, 32, 0.55, "assumed", ("NVIDIA-A10",), "A10 datasheet (150 W)"),
        Gpu("RTX-A6000", 47.5, 154.8, 0, 768, 32, 32, 0.75, "assumed", ("NVIDIA-RTX-A6000",), "RTX A6000 datasheet, dense half of 309.7"),
        Gpu("RTX-6000-ADA", 47.4, 364.2, 728.5, 960, 32, 32, 0.62, "assumed", ("NVIDIA-RTX-6000-Ada-Generation",),
            "RTX 6000 Ada datasheet, dense"),
        Gpu("RTX-4090", 23.5, 165.2, 330.3, 1008, 32, 32, 0.85, "assumed", ("NVIDIA-GeForce-RTX-4090",),
            "Ada whitepaper, FP32 accumulation; no peer-to-peer"),
        Gpu("RTX-3090", 23.5, 71.0, 0, 936, 32, 32, 0.85, "assumed", ("NVIDIA-GeForce-RTX-3090",), "GA102 whitepaper, FP32 accumulation"),
    )
}


def find(name: str, field: str = "resources.gpu") -> Gpu:
    """The GPU type of that name (case and `_` do not matter), or of a device name or product label as the driver gives it.

    Raises ConfigError naming `field` and the known types.
    """
    key = name.strip().upper().replace("_", "-").replace(" ", "-")
    for gpu in GPUS.values():
        if key == gpu.name or any(key == product.upper() for product in gpu.products):
            return gpu
    raise ConfigError(field, name, f"Known GPU types: {', '.join(GPUS)}.")
