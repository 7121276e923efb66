"""Where a process stands among its peers: what torchrun, accelerate, deepspeed or SLURM's srun say in the environment.

Needs no torch to tell that, so that it can be asked before the seconds of an import.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from npp_ds.errors import UserError

LAUNCHER, SLURM = ("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")


@dataclass(frozen=True)
class Place:
    """`rank` of `world_size` processes in all; `local_rank` on this machine."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def place_of_environment(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place, of a launcher's variables before SLURM's; alone when there are none."""
    for names in (LAUNCHER, SLURM):
        values = [environment.get(name, "") for name in names]
        if all(map(str.isdecimal, values)):
            return Place(*map(int, values))
    return Place()


def choose_device(name: str, local_rank: int) -> str:
    """The device of a process that computes on its own, from "auto", "cpu" or "cuda": a GPU by its local rank.

    Raises UserError for "cuda" without one.
    """
    import torch

    cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    if name == "cuda":
        if not cuda:
            raise UserError("device cuda: no GPU found; expected one, or give --device cpu")
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
        torch.cuda.set_device(name)
    return name
