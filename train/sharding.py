"""Weights, gradients and Adam's moments shared out over all processes (`launch=fsdp2`, `launch=zero3`).

On GPUs Accelerate prepares the model, with the plugins made here. On CPUs, where Accelerate silently leaves its FSDP
plugin out, `shard` does with torch's `fully_shard` what the plugin asks for: every decoder layer on its own, then the
rest. Saving and loading are the same code for both: torch's distributed checkpoints, which any number of processes
can go on from.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from conf.schema import FinetuneConfig, Precision, Sharding

Optimizer = torch.optim.Optimizer


def plugins(sharding: Sharding, finetune: FinetuneConfig, on_cpu: bool) -> dict[str, Any]:
    """What Accelerator(...) is given for a kind of sharding; ValueError for what cannot work."""
    if sharding is not Sharding.none and finetune.mixed_precision is Precision.fp16:
        raise ValueError(f"launch.sharding={sharding.value} does not train in fp16; use finetune.mixed_precision=bf16")
    if sharding is Sharding.fsdp2:
        return {} if on_cpu else {"fsdp_plugin": fsdp_plugin()}
    if sharding is Sharding.zero3:
        if on_cpu:
            raise ValueError("launch.sharding=zero3 needs GPUs (DeepSpeed); on CPUs use launch.sharding=fsdp2")
        if find_spec("deepspeed") is None:
            raise ValueError("launch.sharding=zero3 needs the package deepspeed; install it, or use launch=fsdp2")
        return {"deepspeed_plugin": deepspeed_plugin(finetune)}
    return {}


def fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """Version 2, a unit for every layer that the model's class names in `_no_split_modules`."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )


def deepspeed_plugin(finetune: FinetuneConfig) -> DeepSpeedPlugin:
    """ZeRO-3. The loop says itself which micro-batch is a step's last, so DeepSpeed accumulates over one."""
    plugin = DeepSpeedPlugin(
        zero_stage=3,
        gradient_accumulation_steps=1,
        gradient_clipping=finetune.max_grad_norm,
        zero3_save_16bit_model=True,
    )
    # Accelerate would read it off a DataLoader, which there is none of.
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = finetune.micro_batch_size
    return plugin


def units(model: nn.Module) -> list[nn.Module]:
    """The modules that are shared out on their own: the wrap policy of `fsdp_plugin`."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def shard(model: nn.Module) -> None:
    """Share a model out over all CPU processes, in place."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for unit in units(model):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


def prepare(
    accelerator: Accelerator, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer], sharding: Sharding
) -> tuple[nn.Module, Any]:
    """Model and optimiser ready for the launch at hand."""
    if sharding is not Sharding.fsdp2 or accelerator.distributed_type is DistributedType.FSDP:
        prepared: tuple[nn.Module, Any] = accelerator.prepare(model, make_optimizer(model))
        return prepared
    model = accelerator.prepare_model(model, evaluation_mode=True)  # autocast, and no DistributedDataParallel
    if accelerator.num_processes > 1:
        shard(model)
    return model, accelerator.prepare_optimizer(make_optimizer(model))


def accumulating(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around a micro-batch: gradients are exchanged in the last one of a step alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        return nullcontext()
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        accelerator.sync_gradients = last
        return nullcontext()
    return nullcontext() if last else accelerator.no_sync(model)


def clip(accelerator: Accelerator, model: nn.Module, limit: float) -> float:
    """Clip the gradients of all processes together; their norm before."""
    norm: Any = accelerator.clip_grad_norm_(model.parameters(), limit)
    if norm is None:  # DeepSpeed has clipped in its own step
        norm = model.get_global_grad_norm()  # type: ignore[operator]
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def whole_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Any]:
    """All weights on the main process, put together again if they were shared out."""
    if isinstance(model, FSDPModule):
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    state: dict[str, Any] = accelerator.get_state_dict(model)
    return state


class ShardedStates:
    """Model and optimiser in a folder, every process its part; any number of processes can load it."""

    sharding = Sharding.fsdp2.value

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer = model, getattr(optimizer, "optimizer", optimizer)

    def _states(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, folder: Path) -> None:
        try:
            distributed_checkpoint.save(self._states(), checkpoint_id=folder / "states")
        except CheckpointException as error:  # no Exception, so that nobody above would clean up
            raise OSError(str(error)) from error

    def load(self, folder: Path) -> None:
        states = self._states()
        distributed_checkpoint.load(states, checkpoint_id=folder / "states")
        set_state_dict(
            self.model, self.optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
        )


class WholeStates:
    """The same as Accelerate keeps it: every process holds all, or DeepSpeed its own."""

    def __init__(self, accelerator: Accelerator, sharding: Sharding) -> None:
        self.accelerator, self.sharding = accelerator, sharding.value

    def save(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        self.accelerator.load_state(str(folder))
