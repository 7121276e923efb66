"""Where a process stands among its peers: what torchrun, accelerate, deepspeed or SLURM's srun say in the environment.

Needs no torch to tell that, so that it can be asked before the seconds of an import.
"""

import os
import re
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from npp_ds.errors import UserError

# Below the ports that Linux gives to outgoing connections, above those of SLURM's own daemons.
FIRST_PORT, PORTS = 10_000, 20_000


@dataclass(frozen=True)
class Place:
    """`rank` of `world_size` processes in all; `local_rank` on this machine."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def place_of_environment(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place, of a launcher's variables before those of SLURM's srun; alone when there are none.

    Raises UserError for a variable that is no whole number.
    """
    if "RANK" in environment:
        rank, local_rank, world_size = (_number(environment, n) for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        return Place(rank, local_rank, max(1, world_size))
    if is_srun_task(environment):
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
        return Place(*(_number(environment, name) for name in names))
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


def choose_dtype(name: str, device: str) -> str:
    """The dtype in which a model is sampled: "auto" is bf16 on a GPU and fp32 elsewhere."""
    return ("bf16" if device.startswith("cuda") else "fp32") if name == "auto" else name


def is_srun_task(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether srun has started this process.

    SLURM_PROCID and SLURM_NTASKS do not tell: a batch script, which is one process, has them too (0, and all tasks).
    """
    return "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment


def lacks_srun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether SLURM has made room for several tasks and this process is none of them."""
    launched = "RANK" in environment or is_srun_task(environment)
    return not launched and "SLURM_JOB_ID" in environment and _number(environment, "SLURM_NTASKS") > 1


def host_of_environment(environment: Mapping[str, str] = os.environ) -> str:
    """The name of this machine, the one that SLURM knows it by where there is one."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def variables_of_srun(
    environment: Mapping[str, str] = os.environ, address_of: Callable[[str], str] | None = None
) -> dict[str, str]:
    """What torchrun would have set for this task of srun; empty when srun has not started it, or a launcher since.

    MASTER_ADDR is the step's first node, by `address_of` its name; MASTER_PORT follows from the numbers of job, step
    and restart, so that jobs that share a node, and a restart and what is left of its predecessor, do not meet. Both
    stay as they are where they are set.
    """
    if "RANK" in environment or not is_srun_task(environment):
        return {}
    place = place_of_environment(environment)
    per_node = expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    here = str(per_node[min(_number(environment, "SLURM_NODEID"), len(per_node) - 1)])
    found = {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_WORLD_SIZE": here,
        "LOCAL_SIZE": here,  # DeepSpeed's name for it
    }
    if "MASTER_ADDR" not in environment:
        nodes = expand_nodes(environment.get("SLURM_STEP_NODELIST", ""))
        found["MASTER_ADDR"] = "127.0.0.1" if len(nodes) < 2 else (address_of or address_of_node)(nodes[0])
    if "MASTER_PORT" not in environment:
        job, step, restart = (_number(environment, f"SLURM_{n}") for n in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
        found["MASTER_PORT"] = str(rendezvous_port(job, step, restart))
    return found


def rendezvous_port(job: int, step: int, restart: int) -> int:
    """A port for the processes of a step to meet at: neighbouring jobs, steps and restarts have different ones."""
    return FIRST_PORT + (job * 37 + step + restart) % PORTS


def address_of_node(name: str) -> str:
    """Where a node of this cluster is reached: its name when that resolves here, else the address that SLURM uses.

    Raises UserError when neither is known.
    """
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:
        pass
    try:
        shown = subprocess.run(["scontrol", "show", "node", name], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    if found := re.search(r"\bNodeAddr=(\S+)", shown):
        return found[1]
    raise UserError(
        f"node {name}: its name resolves to no address on {host_of_environment()} and scontrol knows none; "
        "set MASTER_ADDR to an address of the first node"
    )


def expand_nodes(text: str) -> list[str]:
    """The nodes in SLURM's short form, in order: `a[01-03,7],b` is a01, a02, a03, a7, b."""
    nodes = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        names = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", item):
            names = [name + part for name in names for part in ([plain] if plain else _expand_ranges(ranges))]
        nodes += names
    return nodes


def expand_counts(text: str) -> list[int]:
    """The numbers in SLURM's short form, a node each: `8(x2),4` is 8, 8, 4."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _expand_ranges(text: str) -> list[str]:
    numbers = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return numbers


def _number(environment: Mapping[str, str], name: str) -> int:
    """The number in a variable, 0 when it is absent."""
    text = environment.get(name, "0")
    if not text.isdecimal():
        raise UserError(
            f"environment variable {name}: found {text!r}, expected a whole number; "
            "start with srun, with torchrun, or alone"
        )
    return int(text)
