"""The processes of a run: one, or as many as torchrun started, each with a GPU or on the CPU."""

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from train.model import ImageEncoder

# Modules whose weights are gathered together under FSDP, one after the other
SHARD_UNITS = (LlamaDecoderLayer,)
# Modules that stay whole on every process. FSDP needs every process to use a sharded module equally often, and how
# often this one is used depends on the images: not at all for text, once for each size
REPLICATED = (ImageEncoder,)


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class World:
    """This process among the others.

    rank, size: its number and how many there are. device: where it computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value` (anything that pickles), by rank, on every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add up the gradients over the processes, but for FSDP's, who has done so.

        A missing one (the encoder's, where a step has no image) becomes 0, with one process too: AdamW passes over a
        parameter without gradient, and whether another process has one must not change what it does.
        """
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.size > 1 and not isinstance(parameter, DTensor):
                dist.all_reduce(parameter.grad)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def join() -> World:
    """The world as torchrun describes it in the environment. Call `leave` at the end."""
    if "LOCAL_RANK" not in os.environ:
        return World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    # The hours are for saving a large checkpoint, which one process does while the others wait
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=2))
    return World(state.process_index, state.num_processes, state.device)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: nn.Module, world: World, compute: torch.dtype) -> None:
    """Spread the parameters of `model` over the processes (FSDP 2), to compute in `compute` and sum in float32.

    Gradients are sums over the processes, as `World.sum_gradients` makes those of what is replicated.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    replicated = {p for module in model.modules() if isinstance(module, REPLICATED) for p in module.parameters()}
    for module in model.modules():
        if isinstance(module, SHARD_UNITS):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=replicated)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # Gloo, for CPUs, has no sum with a factor


def apart(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """AdamW's groups with sharded and replicated parameters in different ones: its kernels take either, not both."""
    return [
        group | {"params": parameters}
        for group in groups
        for sharded in (False, True)
        if (parameters := [p for p in group["params"] if isinstance(p, DTensor) == sharded])
    ]


def gradient_norm(parameters: list[nn.Parameter]) -> float:
    """Of all gradients together, sharded or not."""
    gradients = [parameter.grad for parameter in parameters]
    sharded = nn.utils.get_total_norm([g for g in gradients if isinstance(g, DTensor)])
    replicated = nn.utils.get_total_norm([g for g in gradients if not isinstance(g, DTensor)])
    return math.hypot(replicated, sharded.full_tensor() if isinstance(sharded, DTensor) else sharded)


def whole_model_state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, unsharded, on the CPU. Every process calls it; only the main one need get it."""
    return get_model_state_dict(model, options=_WHOLE)


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put unsharded tensors, given on every process, into `model`; what is not among them stays."""
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))


def whole_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the optimiser remembers of each parameter, by its name, on the CPU; called and got as `whole_model_state`.

    Without its groups, which differ where parameters are sharded.
    """
    return get_optimizer_state_dict(model, optimizer, options=_WHOLE).get("state", {})


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of `whole_optimizer_state`, given on every process; the groups stay as they are."""
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    whole = {"state": state, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, whole, options=StateDictOptions(full_state_dict=True))
