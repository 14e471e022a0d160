"""DeepSpeed ZeRO-1, -2 and -3, with optimizer state on the GPU, in host memory or on NVMe.

The model, its forward pass and its compiled layers are those of the other engines; DeepSpeed partitions state and moves gradients.
Under ZeRO-3 each decoder layer is one unit ("leaf module"): gathered at once, so that it can be compiled. AdamW is PyTorch's fused
one, on the GPU and on the host, so that nothing is compiled at start.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer.config import Config, ConfigError
from trainer.engines.base import Engine, Piece
from trainer.engines.layers import KEEP_ALL, Checkpointing, decoder_layers, prepare_layers
from trainer.engines.optimizer import decays
from trainer.errors import UserError
from trainer.model.load import (
    DTYPES,
    base_config,
    empty_model,
    fill,
    give_memory,
    held,
    materialise,
    model_config,
    open_weights,
    restore_buffers,
)
from trainer.model.loss import token_loss_sum, use_packed_forward
from trainer.model.methods import MethodWeights, canonical, shape_for_method

if TYPE_CHECKING:
    from trainer.data.loader import PackedBatch

BUCKET = {"cuda": 500_000_000, "cpu": 4_000_000}
"""Elements of a reduction or prefetch bucket, at most: a GPU's links want large ones, a CPU has no memory to spare for them."""


def deepspeed_config(config: Config, device: torch.device, elements: int, width: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run. `elements`: the model's parameters; `width`: its hidden size."""
    run, engine = config.run, config.run.engine
    bucket = min(BUCKET[device.type], elements)
    zero: dict[str, Any] = {
        "stage": engine.zero_stage, "contiguous_gradients": True, "overlap_comm": device.type == "cuda",
        "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if engine.zero_stage == 3:
        zero |= {"memory_efficient_linear": False, "stage3_prefetch_bucket_size": bucket,
                 "stage3_param_persistence_threshold": 10 * width, "stage3_max_live_parameters": 2_000_000_000,
                 "stage3_max_reuse_distance": 0}
    if engine.offload != "none":
        pin = device.type == "cuda"
        zero["offload_optimizer"] = {"device": engine.offload, "pin_memory": pin}
        if engine.offload == "nvme":
            if not config.resources.scratch:
                raise ConfigError("resources.scratch", "", "Give a node-local directory: run.engine.offload is nvme.")
            if engine.zero_stage != 3:
                raise ConfigError("run.engine.zero_stage", engine.zero_stage, "Offload to NVMe needs stage 3.")
            zero["offload_optimizer"]["nvme_path"] = config.resources.scratch
    low = run.model.dtype == "bfloat16"
    return {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": run.train.max_grad_norm,
            "bf16": {"enabled": low}, "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": {"float32": "fp32", "bfloat16": "bf16"}[engine.reduce_dtype] if low else "fp32",
            "zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 40}


class DeepSpeedEngine(Engine):
    """See the module's text."""

    def __init__(self, config: Config, tokens: int | None, device: torch.device, rank: int, world: int,
                 checkpointing: Checkpointing = KEEP_ALL) -> None:
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed takes its device from here; a worker may see one GPU only
        try:
            import deepspeed
            from deepspeed.utils import logger
        except (ImportError, RuntimeError, OSError) as error:
            raise UserError(f"run.engine.kind: deepspeed does not load here: {error}") from None
        logger.setLevel(logging.WARNING)
        # On the CPU DeepSpeed would compile its own shared-memory all-reduce at start (30 s, a compiler in the image); gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if config.run.engine.offload == "nvme":
            _require_async_io()
        self.config, self.device, self.rank, self.world = config, device, rank, world
        self.target = model_config(config, tokens)
        self.dtype = DTYPES[config.run.model.dtype]
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)
        self.model = self._build(checkpointing)
        train = config.run.train
        groups = [{"params": [p for n, p in self._trained() if decays(n, _shape(p)) == decay],
                   "weight_decay": train.weight_decay if decay else 0.0} for decay in (True, False)]
        self._adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(train.beta1, train.beta2), eps=train.epsilon,
                                       fused=True)
        self.engine, _, _, _ = deepspeed.initialize(model=self.model, optimizer=self._adam, config=self.ds)
        self.engine.train()
        self._zero = self.engine.optimizer
        self._start_states()

    def _build(self, checkpointing: Checkpointing) -> nn.Module:
        run = self.config.run
        model: Any = empty_model(self.target, self.dtype)
        self.ds = deepspeed_config(self.config, self.device, sum(p.numel() for p in model.parameters()), self.target.hidden_size)
        shape_for_method(model, run.method, base_config(self.config).vocab_size, self.dtype)
        use_packed_forward(model)
        prepare_layers(model, run.engine, checkpointing, self.device)
        weights = MethodWeights(open_weights(self.config, self.target), model, run.seed)
        if run.engine.zero_stage == 3:
            if run.method.kind != "full":
                # ZeRO-3 releases a layer's weights when its input's gradient is done: the first layer's input must have one too.
                model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
            self._fill_partitioned(model, weights)
        else:
            materialise(model, self.device)
            fill(held(model, canonical), weights)
        return model

    def _fill_partitioned(self, model: nn.Module, weights: MethodWeights) -> None:
        """Give memory to one part after the other, read it on rank 0, partition it: no rank holds more than one part whole."""
        import deepspeed
        from deepspeed.utils import set_z3_leaf_modules

        names = {id(m): n for n, m in model.named_modules()}
        for part in [*decoder_layers(model), model]:
            prefix = f"{names[id(part)]}." if part is not model else ""
            fresh = {n for n, p in part.named_parameters() if p.is_meta}
            give_memory(part, self.device)
            if self.rank == 0:
                fill(((canonical(prefix + n), shape, flat, start) for n, shape, flat, start in held(part, only=fresh)), weights)
            deepspeed.zero.Init(module=part, config_dict_or_path=self.ds, dtype=self.dtype)  # broadcasts from rank 0, then partitions
        restore_buffers(model, self.device)
        set_z3_leaf_modules(model, [type(decoder_layers(model)[0])])

    def _trained(self) -> list[tuple[str, Any]]:
        return [(canonical(n), p) for n, p in self.model.named_parameters() if p.requires_grad]

    # The step

    def forward_backward(self, batches: Sequence[PackedBatch], loss_tokens: int) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            loss = token_loss_sum(self.engine, batch, self.device)
            self.engine.backward(loss * (self.world / loss_tokens), scale_wrt_gas=False)  # DeepSpeed divides by the number of ranks
            total += loss.detach()
        return total

    def step(self, learning_rate: float) -> torch.Tensor:
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)

    @property
    def forward_model(self) -> nn.Module:
        return self.engine

    # State

    def _flat(self) -> list[torch.Tensor]:
        """This rank's float32 masters, one flat tensor a (sub)group."""
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(self._zero, name):
                return list(getattr(self._zero, name))
        raise UserError(f"This version of DeepSpeed keeps its masters elsewhere ({type(self._zero).__name__}).")

    def _start_states(self) -> None:
        """Make AdamW's state now: a checkpoint may be taken or loaded before the first step."""
        for flat in self._flat():
            self._adam.state[flat] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device),
                                      "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}

    def _ranges(self) -> Iterator[tuple[str, tuple[int, ...], int, int, int, int]]:
        """(name, whole shape, start in the flattened whole, group, offset in the group's flat tensor, elements) held here."""
        for name, parameter in self._trained():
            shape = _shape(parameter)
            if self.config.run.engine.zero_stage == 3:
                group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start = self.rank * parameter.ds_tensor.ds_numel  # partitions are of one size, the last one padded
                count = max(min(math.prod(shape) - start, parameter.ds_tensor.ds_numel), 0)
                if count:
                    yield name, shape, start, group, offset, count
            elif (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
                where, source = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
                yield name, shape, source.start, mapping.param_group_index, where.start, where.numel

    def pieces(self) -> list[Piece]:
        flat, out = self._flat(), []
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            for name, shape, start, group, offset, count in self._ranges():
                whole = flat[group] if kind == "weights" else self._adam.state[flat[group]][kind]
                out.append(Piece(f"{kind}/{name}", shape, start, whole.detach().narrow(0, offset, count)))
        return out

    @torch.no_grad()
    def load_pieces(self, read: Callable[[str, int, torch.Tensor], None], step: int) -> None:
        for piece in self.pieces():
            host = torch.empty(piece.tensor.numel(), dtype=piece.tensor.dtype)
            read(piece.name, piece.start, host)
            piece.tensor.copy_(host)
        for flat in self._flat():
            self._adam.state[flat]["step"].fill_(step)
        if self.config.run.engine.zero_stage == 3:
            for group in range(len(self._flat())):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            if persistent := self._zero.persistent_parameters:
                persistent[0].partition(persistent, has_been_updated=False)
                persistent[0].all_gather(persistent)
        else:
            self._zero.update_lp_params()

    def close(self) -> None:
        """DeepSpeed's hooks hold the model through cycles that Python cannot collect: the memory itself is given back."""
        held = list(_tensors(vars(self._zero), 3)) + list(_tensors(self._adam.state, 3))
        for parameter in self.model.parameters():
            held += [parameter.data, *_tensors(vars(parameter), 1), *([parameter.grad] if parameter.grad is not None else [])]
        self.engine.destroy()
        for storage in (tensor.untyped_storage() for tensor in held):
            if storage.resizable():  # not memory that came from numpy
                storage.resize_(0)


def _tensors(value: Any, depth: int) -> Iterator[torch.Tensor]:
    """Tensors in nested containers, `depth` levels deep."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(value, list | tuple | set | deque):
        for item in value:
            yield from _tensors(item, depth - 1)


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _require_async_io() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError("run.engine.offload", "nvme", "DeepSpeed's asynchronous I/O needs libaio in the image; use cpu.")
    raise ConfigError("run.engine.offload", "nvme", "Checkpoints cannot read state that lies on NVMe yet; use cpu.")
