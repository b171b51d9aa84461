"""The processes of a run: one, or as many as torchrun started, each with a GPU or on the CPU."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

# Modules whose weights are gathered together under FSDP, one at a time
SHARD_UNITS = (LlamaDecoderLayer, ConvNeXtBlock)


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

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add up the gradients of replicated parameters over the processes; one without a gradient counts as 0."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def join() -> World:
    """The world as torchrun describes it in the environment. Call `leave` at the end."""
    if "LOCAL_RANK" not in os.environ:
        return World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    state = PartialState(timeout=timedelta(hours=2))  # what saving a large checkpoint may take
    return World(state.process_index, state.num_processes, state.device)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: nn.Module, world: World, compute: torch.dtype) -> None:
    """Spread the parameters of `model` over the processes (FSDP 2), to compute in `compute` and sum in float32."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, SHARD_UNITS):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def whole_model_state(model: nn.Module, sharded: bool) -> dict[str, Tensor]:
    """All parameters and buffers, unsharded; of a sharded model on the CPU, and empty but on the main process."""
    if not sharded:
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_model_state(model: nn.Module, state: dict[str, Tensor], sharded: bool) -> None:
    """Put tensors, unsharded and given on every process, into `model`; what is not among them stays."""
    if not sharded:
        model.load_state_dict(state, strict=False)
        return
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))


def whole_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, sharded: bool) -> dict[str, Any]:
    """The optimiser's state_dict; of a sharded model by parameter names, on the CPU, empty but on the main process."""
    if not sharded:
        return optimizer.state_dict()
    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], sharded: bool
) -> None:
    """The inverse of `whole_optimizer_state`; the state given on every process."""
    if not sharded:
        optimizer.load_state_dict(state)
        return
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
