"""The rank of this process, from the variables of torchrun, accelerate, deepspeed or SLURM's srun, and its device.

Imports torch only to ask about a device, so that a command knows its rank before the seconds which that import takes.
"""

import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from npp_ds.errors import UserError

# Below the ports that Linux gives to outgoing connections, above those of SLURM's own daemons.
FIRST_PORT, PORTS = 10_000, 20_000
CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class ProcessInfo:
    """`rank` among the `world_size` processes of a launch; `local_rank` among those on the same node."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def read_environment(environment: Mapping[str, str] = os.environ) -> ProcessInfo:
    """Return this process's ranks: from a launcher's variables, else from those of srun, else those of a lone process.

    Raises UserError for a variable that is not a whole number.
    """
    if "RANK" in environment:
        rank, local_rank, world_size = (_number(environment, n) for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        return ProcessInfo(rank, local_rank, max(1, world_size))
    if is_srun_task(environment):
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
        return ProcessInfo(*(_number(environment, name) for name in names))
    return ProcessInfo()


def processes_on_node(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of processes of this launch on this machine; all of them if the launcher does not say it."""
    if "RANK" not in environment and (found := re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))):
        return int(found[0])  # such as 8(x2)
    return max(1, _number(environment, "LOCAL_WORLD_SIZE") or read_environment(environment).world_size)


def host_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return the name of this machine: SLURM's name for it, if there is one."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def is_srun_task(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether srun started this process.

    SLURM_PROCID and SLURM_NTASKS do not show it: a batch script, which is one process, has them too (0, and all tasks).
    """
    return "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment


def lacks_srun(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the SLURM job has several tasks and this process is none of them, because srun was left out."""
    launched = "RANK" in environment or is_srun_task(environment)
    return not launched and "SLURM_JOB_ID" in environment and _number(environment, "SLURM_NTASKS") > 1


def srun_rendezvous(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return MASTER_ADDR and MASTER_PORT of a task of srun, those that are not set yet; {} for any other process.

    Raises UserError if the step has several nodes and MASTER_ADDR is not set. The job scripts set it (slurm/common.sh).
    """
    if "RANK" in environment or not is_srun_task(environment):
        return {}
    found = {}
    if "MASTER_ADDR" not in environment:
        if (nodes := _number(environment, "SLURM_STEP_NUM_NODES")) > 1:
            raise UserError(
                f"MASTER_ADDR: not set for a step on {nodes} nodes; use the scripts in slurm/, or, in the job, "
                'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
                on_all_ranks=True,
            )
        found["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_PORT" not in environment:
        job, step, restart = (_number(environment, f"SLURM_{n}") for n in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
        found["MASTER_PORT"] = str(rendezvous_port(job, step, restart))
    return found


def rendezvous_port(job: int, step: int, restart: int) -> int:
    """Return the port for the rendezvous of a step; neighbouring jobs, steps and restarts have different ones.

    So jobs that share a node do not collide, nor does a restart with processes that are left of the previous start.
    """
    return FIRST_PORT + (job * 37 + step + restart) % PORTS


def choose_device(name: str, local_rank: int) -> str:
    """Return the torch device for "auto", "cpu" or "cuda"; each local rank gets a GPU of its own if there are enough.

    Raises UserError for "cuda" on a machine without a GPU.
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
    """Return the dtype for sampling: "auto" is bf16 on a GPU and fp32 elsewhere."""
    return ("bf16" if device.startswith("cuda") else "fp32") if name == "auto" else name


def _number(environment: Mapping[str, str], name: str) -> int:
    """Return the number in a variable, 0 if the variable is not set."""
    text = environment.get(name, "0")
    if not text.isdecimal():
        raise UserError(
            f"environment variable {name}: found {text!r}, expected a whole number; "
            "start with srun, with torchrun, or alone"
        )
    return int(text)


def free_memory(device: str) -> int:
    """Return the free bytes of a CUDA device, or of this machine within the limits of the process's control groups."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return min([int(fields["MemAvailable"].split()[0]) << 10, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Yield the bytes left below each memory limit of this process's groups (cgroups version 1 and 2)."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = CGROUPS / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            limit, used = (folder / name for name in names)
            if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
                yield max(0, int(text) - int(used.read_text()))
            if folder == base:
                break
