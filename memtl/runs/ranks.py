"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import atexit
import dataclasses
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..report import check_device


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process, ``rank`` of ``world``, and the device it trains on."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> Ranks:
        """As torchrun's environment says; several stay joined until they end. "auto" is a GPU if
        there is one, each process's own.

        Raises:
            ValueError: the device cannot be used, or there are more processes than GPUs.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if world == 1:
            check_device(kind)
            return cls(0, 1, torch.device(kind))
        if ":" in kind:
            raise ValueError(f"device must be cuda, cpu or auto under torchrun, got {kind!r}")
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if kind == "cuda":
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"{local + 1} or more processes on this machine, but {kind} has "
                    f"{torch.cuda.device_count()} devices: lower --nproc-per-node"
                )
            kind = f"cuda:{local}"
            torch.cuda.set_device(local)
        check_device(kind)
        found = torch.device(kind)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
            # Not sooner: in one process torch 2.11 does not join those of torchrun a second time.
            atexit.register(dist.destroy_process_group)
        return cls(dist.get_rank(), dist.get_world_size(), found)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sums over all processes, on the CPU."""
        if self.world == 1:
            return values.cpu()
        values = values.to(self.device)
        dist.all_reduce(values)
        return values.cpu()

    def from_first(self, value: Any) -> Any:
        """What the first process has."""
        if self.world == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, 0)
        return held[0]

    def spread(self, model: nn.Module, sharded: bool) -> nn.Module:
        """What to train: ``model`` itself; with others a copy in each process
        (DistributedDataParallel) or, ``sharded``, a part of every weight (``fully_shard``, block by
        block)."""
        if self.world == 1:
            return model
        if not sharded:
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(model, device_ids=ids)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members of lists of two or more modules of one class, the outermost such lists."""
    found = []
    for child in model.children():
        members = list(child.children())
        alike = len(members) > 1 and len({type(member) for member in members}) == 1
        listed = isinstance(child, (nn.ModuleList, nn.Sequential))
        found += members if listed and alike else blocks(child)
    return found


def whole(t: Any) -> Tensor:
    """A tensor that may be sharded, all of it; every process has to ask."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def like(t: Tensor, own: Any) -> Tensor:
    """The whole tensor ``t``, of ``own``'s shape, sharded as ``own`` is."""
    if not hasattr(own, "full_tensor") or t.shape != own.shape:
        return t
    from torch.distributed.tensor import distribute_tensor

    # Every process has all of it: nothing is sent.
    return distribute_tensor(t.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
