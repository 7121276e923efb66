"""Checks that all processes make together, once each of them is well: sums, speed, one run folder."""

import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from npp_ds.doctor.context import Context, made_for_now
from npp_ds.doctor.outcome import FAILURE, WARNING, Check, Outcome
from npp_ds.training.run_folder import check_shared
from npp_ds.utils.format import format_bytes
from npp_ds.utils.locks import locked

GPU_MESSAGE_BYTES, CPU_MESSAGE_BYTES = 64 << 20, 4 << 20
SLOW_BYTES_PER_SECOND = 2e9  # between nodes with GPUs: what a single Ethernet link of 25 Gb/s would reach
SHARED_PATIENCE_SECONDS = 20.0


def all_reduce(context: Context) -> Outcome:
    """A one from each rank at its own place: exact in every dtype, and it shows who was left out."""
    half = context.config is None or context.config.precision != "fp32"
    dtypes = [torch.float32, *([torch.bfloat16] if half else []), torch.int64, torch.float64]
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    processes = context.processes
    for dtype, name in zip(dtypes, names, strict=True):
        values = torch.zeros(processes.world_size, dtype=dtype, device=processes.device)
        values[processes.rank] = 1
        dist.all_reduce(values)
        if wrong := [rank for rank, value in enumerate(values.tolist()) if value != 1]:
            found = ", ".join(f"{values[rank].item():g}" for rank in wrong[:4])
            return Outcome(f"{name}: sums of ranks {wrong[:4]} are {found}, expected 1; see NCCL_DEBUG=INFO", FAILURE)
    return Outcome(f"right in {', '.join(names)} over {dist.get_backend()}")


def speed(context: Context) -> Outcome | None:
    """Bus bandwidth as nccl-tests count it: 2 (n - 1) / n times the bytes, over the best time of three."""
    processes = context.processes
    if processes.world_size == 1:
        return None
    size = GPU_MESSAGE_BYTES if context.has_gpu else CPU_MESSAGE_BYTES
    message = torch.ones(size // 4, device=processes.device)
    seconds = min([_seconds_of(context, lambda: dist.all_reduce(message)) for _ in range(4)][1:])
    barrier = min(_seconds_of(context, dist.barrier) for _ in range(3))
    rate = 2 * (processes.world_size - 1) / processes.world_size * size / seconds
    speed = f"{format_bytes(size)} in {1e3 * seconds:.1f} ms ({format_bytes(rate)}/s on the bus)"
    text = f"{speed}, barrier {1e3 * barrier:.2f} ms"
    if context.has_gpu and len(set(context.nodes)) > 1 and rate < SLOW_BYTES_PER_SECOND:
        advice = "see with NCCL_DEBUG=INFO which network it takes; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose one"
        return Outcome(f"{text}: slow between nodes; {advice}", WARNING)
    return Outcome(text, margin=rate)


def run_folder(context: Context) -> Outcome | None:
    """One folder for all nodes, that all can write into, with locks that reach from node to node."""
    processes, run_dir = context.processes, context.config.directory
    with ExitStack() as stack:
        token, has_locks = processes.on_first(lambda: stack.enter_context(_trial(run_dir)))
        try:
            outcome = _see(context, _folder_of(run_dir, token), token, has_locks)
        finally:
            processes.gather(None)  # only then the first process removes it
    return outcome


def _folder_of(run_dir: Path, token: str) -> Path:
    return run_dir / f".doctor-{token}"


@contextmanager
def _trial(run_dir: Path) -> Iterator[tuple[str, bool]]:
    """Puts a folder with a lease and a lock of its own into the run folder: (token of both, whether locks work)."""
    token = secrets.token_hex(8)
    folder = _folder_of(run_dir, token)
    with made_for_now(run_dir):
        folder.mkdir()
        try:
            (folder / "lease.json").write_text(token)
            with locked(folder / "lock", 0.0) as had:
                yield token, had
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _see(context: Context, folder: Path, token: str, has_locks: bool) -> Outcome | None:
    if not context.is_first_of_node:
        return None
    check_shared(folder, token, SHARED_PATIENCE_SECONDS)
    (folder / f"written-by-{context.processes.rank}").write_bytes(b"x")
    run_dir = folder.parent
    lease = "the lease holds by its heartbeat alone: start no second job in this folder by hand"
    if not has_locks:
        return Outcome(f"{run_dir}: shared, but its file system has no locks; {lease}", WARNING)
    if not context.is_first:
        with locked(folder / "lock", 0.0) as had:
            if had:
                return Outcome(f"{run_dir}: shared, but locks do not reach from node to node; {lease}", WARNING)
    return Outcome(f"{run_dir}: seen and written by all nodes, with locks")


def _seconds_of(context: Context, action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    if context.has_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


CHECKS = (Check("all-reduce", all_reduce), Check("speed", speed))
CHECKS_OF_RUN = (Check("run folder", run_folder),)
