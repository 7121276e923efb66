"""The process group of a launch by torchrun, the deepspeed launcher or SLURM's srun, or of a lone process."""

import ctypes
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from npp_ds.distributed.environment import (
    ProcessInfo,
    host_name,
    lacks_srun,
    read_environment,
    srun_rendezvous,
)
from npp_ds.errors import RendezvousError, UserError, as_user_error

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
"""Limit for the rendezvous: imports from a shared file system may take one node minutes longer than another."""
PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)
"""Limit for one exchange, in which one process may be staging data while the others wait."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run as one of them sees them: its `rank`, its `local_rank` on its node, its device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> list[float]:
        """Return the sums over all processes of a vector of float32 numbers; waits for the device."""
        values = values.detach().float().clone()
        dist.all_reduce(values)
        return values.tolist()

    def largest(self, values: list[float]) -> list[float]:
        """Return the largest value over all processes of each number; waits for the device."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return what each process passed, by rank; small plain values."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_first(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of `action(*arguments)` on the first process, on all.

        An error of the action that a user can fix (`as_user_error`) is raised as a UserError on all.
        """
        shared: list[Any] = [_attempt(action, *arguments) if self.is_first else None]
        dist.broadcast_object_list(shared, device=self.device)
        result, problem = shared[0]
        if problem is not None:
            raise UserError(problem, on_all_ranks=True)
        return result

    def on_all(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Return this process's result of `action(*arguments)`; errors are raised as by `on_first`."""
        result, problem = _attempt(action, *arguments)
        found = self.gather(problem and (problem, f"rank {self.rank}, host {host_name()}"))
        if problems := [p for p in found if p is not None]:
            text, who = problems[0]
            raise UserError(text if len(problems) == self.world_size else f"{who}: {text}", on_all_ranks=True)
        return result


def _attempt(action: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """Return (result, None), or (None, text of the error) after one that a user can fix."""
    try:
        return action(*arguments), None
    except Exception as error:
        if not isinstance(found := as_user_error(error), UserError):
            raise
        return None, str(found)


def join_processes(
    timeout: timedelta = PROCESS_GROUP_TIMEOUT, end_if_asked: Callable[[], None] = lambda: None
) -> Processes:
    """Join the process group of this launch (NCCL on GPUs, gloo on CPUs), a group of one without a launcher.

    `timeout` is for one exchange. The rendezvous waits for RENDEZVOUS_TIMEOUT and calls `end_if_asked` meanwhile,
    which may raise to give up. Raises UserError when there are more
    processes on the node than GPUs, RendezvousError when the others do not arrive. On CPUs the process keeps the
    memory that its tensors free from then on.
    """
    if lacks_srun():
        raise UserError(
            f"SLURM job {os.environ['SLURM_JOB_ID']} has {os.environ['SLURM_NTASKS']} tasks, but this process "
            "is none of them: it would train alone; start it with srun, or one task per node with torchrun in it"
        )
    os.environ.update(srun_rendezvous())
    us = read_environment()
    for name, value in {"RANK": us.rank, "LOCAL_RANK": us.local_rank, "WORLD_SIZE": us.world_size}.items():
        os.environ[name] = str(value)  # DeepSpeed reads them, with any launcher
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", _gpu_of(us.local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if not dist.is_initialized():
        dist.init_process_group(
            backend="nccl" if cuda else "gloo",
            store=_rendezvous(us, RENDEZVOUS_TIMEOUT, timeout, end_if_asked),
            rank=us.rank,
            world_size=us.world_size,
            timeout=timeout,
            device_id=device if cuda else None,
        )
    return Processes(us.rank, us.local_rank, us.world_size, device)


def _gpu_of(local_rank: int, visible: int) -> int:
    """Return the index of a process's GPU: its local rank, or 0 where each process sees only its own GPU."""
    if local_rank < visible:
        return local_rank
    on_node = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if visible == 1 and on_node.isdecimal() and local_rank < int(on_node):  # srun --gpus-per-task, --gpu-bind
        return 0
    raise UserError(
        f"local rank {local_rank} has no GPU of its own: {visible} visible; start at most one process per GPU"
    )


def _rendezvous(
    us: ProcessInfo, patience: timedelta, timeout: timedelta, end_if_asked: Callable[[], None]
) -> dist.Store:
    """Return the store that the processes of this launch share, once all have arrived within `patience`."""
    if us.world_size == 1:
        return dist.HashStore()
    url = f"env://?rank={us.rank}&world_size={us.world_size}"
    meeting: Future[dist.Store] = Future()
    # In a thread, because Python handles signals only when the main thread returns from native code, and torch (2.14)
    # waits there. A daemon, so that a process which gives up can end.
    Thread(target=_fulfil, args=(meeting, lambda: next(dist.rendezvous(url, timeout=patience))[0]), daemon=True).start()
    while not wait([meeting], timeout=0.2).done:
        end_if_asked()
    try:
        store = meeting.result()
    except (RuntimeError, ValueError) as error:  # ValueError: a variable is missing
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RendezvousError(
            f"rank {us.rank} on {host_name()} did not meet all {us.world_size} processes at {where} "
            f"(MASTER_ADDR:MASTER_PORT) within {patience}: {str(error).splitlines()[0]}"
        ) from error
    store.set_timeout(timeout)
    return dist.PrefixStore("npp_ds", store)


def _fulfil(future: Future, action: Callable[[], Any]) -> None:
    try:
        future.set_result(action())
    except BaseException as error:
        future.set_exception(error)


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of `mallopt` in glibc's malloc.h."""
OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")
"""Variables that decide the same; `GLIBC_TUNABLES` may, too."""


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let glibc's allocator keep what tensors free, for the rest of this process; return whether it does.

    By default the memory of a large tensor goes back to the system when it is freed, and the system clears every page
    of the next one, which takes a good part of a short step. The process then stays as large as it has been.
    Changes nothing under settings of the user's own, or with another C library.
    """
    if any(name in environment for name in OF_THE_USER) or "glibc.malloc." in environment.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # No tensor in a mapping of its own, and nothing of the heap's end given back.
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
