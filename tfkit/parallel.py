"""Several processes that train one model: who this one is, what wraps the model, whose rows are whose.

For one process alone every function here does nothing. torch's own engines (DDP, FSDP2) do the work.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world() -> tuple[int, int]:
    """The rank of this process and how many train together: (0, 1) for one alone."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def engine(model: nn.Module, kind: str, device: torch.device) -> nn.Module:
    """The model itself in a single process; among several, wrapped by DDP ("ddp") or sharded in place by FSDP2.

    Under `torchrun` it sets up torch.distributed where nobody has. FSDP2 shards each block of a `ModuleList`.
    """
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    if world()[1] == 1:
        return model
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    from torch.distributed.fsdp import FSDPModule, fully_shard

    inner_first = reversed([*model.modules()])
    blocks = [block for blocks in inner_first if isinstance(blocks, nn.ModuleList) for block in blocks]
    for part in [*blocks, model]:
        if not isinstance(part, FSDPModule):
            fully_shard(part)
    return model


def each_tensor(value, change: Callable[[Tensor], Tensor]):
    """The same structure of tuples, lists and dicts, with every tensor changed; other values stay."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: each_tensor(part, change) for name, part in value.items()}
    return tuple(each_tensor(part, change) for part in value) if isinstance(value, tuple | list) else value


def own_rows(batch):
    """The rows of this process, of each tensor of a batch that all processes have. ValueError unless all get alike."""
    rank, count = world()

    def rows(tensor: Tensor) -> Tensor:
        if tensor.ndim and len(tensor) % count:
            raise ValueError(f"a batch of {len(tensor)} rows cannot be shared by {count} processes; use a multiple")
        return tensor.tensor_split(count)[rank] if tensor.ndim else tensor

    return batch if count == 1 else each_tensor(batch, rows)


def mean(value: Tensor) -> Tensor:
    """Over all processes."""
    if world()[1] > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= world()[1]
    return value


def barrier() -> None:
    """Wait until all processes are here."""
    if world()[1] > 1:
        dist.barrier()


def states(model: nn.Module, optimizer: torch.optim.Optimizer, load: dict | None = None) -> tuple[dict, dict]:
    """The whole weights and moments; with `load` those of a checkpoint are put in first. All processes call it."""
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        if load is not None:
            model.load_state_dict(load["model"])
            optimizer.load_state_dict(load["optimizer"])
        return model.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint import state_dict as sharded

    whole = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    if load is not None:
        sharded.set_state_dict(model, optimizer, model_state_dict=load["model"], optim_state_dict=load["optimizer"],
                               options=whole)  # fmt: skip
    return sharded.get_state_dict(model, optimizer, options=whole)
