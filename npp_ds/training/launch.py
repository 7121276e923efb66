"""Who this process is among its peers, from the environment that torchrun or the deepspeed launcher set, or alone."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

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

    def sum(self, values: torch.Tensor) -> list[float]:
        """Sums over all processes of a vector of float32 numbers; waits for the device."""
        values = values.detach().float().clone()
        dist.all_reduce(values)
        return values.tolist()

    def gather(self, value: Any) -> list[Any]:
        """What each process passed, by rank; small plain values."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_first(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Result of `action(*arguments)` on the first process, for all; what a person can mend is raised on all."""
        outcome = [_attempt(action, *arguments) if self.is_first else None]
        dist.broadcast_object_list(outcome, device=self.device)
        result, problem = outcome[0]
        if problem is not None:
            raise UserError(problem, on_all_ranks=True)
        return result

    def on_all(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """This process's result of `action(*arguments)`; what a person can mend on any process is raised on all."""
        result, problem = _attempt(action, *arguments)
        if found := [p for p in self.gather(problem) if p is not None]:
            raise UserError(found[0], on_all_ranks=True)
        return result


def _attempt(action: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """(result, None), or (None, what a person can mend): wrong input, or files that cannot be read or written."""
    try:
        return action(*arguments), None
    except UserError as error:
        return None, str(error)
    except OSError as error:
        return None, f"{error.filename}: {error.strerror}; mend that or name another place"


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
