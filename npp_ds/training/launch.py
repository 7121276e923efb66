"""Who this process is among its peers, from the environment that torchrun or the deepspeed launcher set, or alone."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from npp_ds.errors import UserError

PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """This process's place: `rank` of `world_size` in all, `local_rank` on its node, and the device it computes on."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mean(self, value: torch.Tensor) -> float:
        """Mean over all processes of a scalar tensor; waits for the device."""
        value = value.detach().float().clone()
        dist.all_reduce(value)
        return value.item() / self.world_size


def world_size_of_environment() -> int:
    """Number of processes of this launch, before any of them has met the others."""
    return _integer("WORLD_SIZE", 1)


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(
            f"environment variable {name}: found {text!r}, expected a whole number; start with torchrun or alone"
        )
    return int(text)


def join_processes() -> Processes:
    """Joins the process group of this launch (NCCL on GPUs, gloo on CPUs), alone when no launcher started us.

    Raises UserError when there are more processes on the node than GPUs.
    """
    if "RANK" not in os.environ and _integer("SLURM_NTASKS", 1) > 1:
        raise UserError(
            f"SLURM started {os.environ['SLURM_NTASKS']} tasks and none of them knows its rank: each would be a run of "
            "its own; start one task per node with torchrun in it"
        )
    rank, local_rank, world_size = _integer("RANK", 0), _integer("LOCAL_RANK", 0), world_size_of_environment()
    for name, value in {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": world_size}.items():
        os.environ[name] = str(value)  # DeepSpeed reads them, whoever launched us
    cuda = torch.cuda.is_available()
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} visible; "
                "start at most one process per GPU"
            )
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if not dist.is_initialized():
        store = dist.HashStore() if world_size == 1 else None
        dist.init_process_group(
            backend="nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=PROCESS_GROUP_TIMEOUT,
            device_id=device if cuda else None,
        )
    return Processes(rank, local_rank, world_size, device)


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
