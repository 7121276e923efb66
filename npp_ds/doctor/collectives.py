"""Checks that all processes make together: sums, network speed, one shared run folder, steps of the run's model."""

import os
import resource
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from npp_ds.config.schedule import Stage
from npp_ds.doctor.checks import FAILURE, WARNING, Check, Context, Result
from npp_ds.errors import is_out_of_memory
from npp_ds.model.patches import group
from npp_ds.training.engine import TrainingEngine
from npp_ds.training.run_folder import check_shared
from npp_ds.utils.files import locked
from npp_ds.utils.format import format_bytes

GPU_MESSAGE_BYTES, CPU_MESSAGE_BYTES = 64 << 20, 4 << 20
SLOW_BYTES_PER_SECOND = 2e9
"""A bandwidth below this is a warning between nodes with GPUs: one Ethernet link of 25 Gb/s would reach it."""
SHARED_FOLDER_TIMEOUT_SECONDS = 20.0
MICRO_BATCHES = 2
"""Most micro-batches per step: from the second on, memory also holds the gradients of the first."""


def all_reduce(context: Context) -> Result:
    """Sum one-hot vectors, each rank's one at its own index: exact in every dtype, and it shows who is missing."""
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
            return Result(f"{name}: sums of ranks {wrong[:4]} are {found}, expected 1; see NCCL_DEBUG=INFO", FAILURE)
    return Result(f"right in {', '.join(names)} over {dist.get_backend()}")


def speed(context: Context) -> Result | None:
    """Measure the bus bandwidth as nccl-tests do: 2 (n - 1) / n times the bytes, over the best time of three."""
    processes = context.processes
    if processes.world_size == 1:
        return None
    size = GPU_MESSAGE_BYTES if context.has_gpu else CPU_MESSAGE_BYTES
    message = torch.ones(size // 4, device=processes.device)
    seconds = min([_seconds_of(context, lambda: dist.all_reduce(message)) for _ in range(4)][1:])
    barrier = min(_seconds_of(context, dist.barrier) for _ in range(3))
    rate = 2 * (processes.world_size - 1) / processes.world_size * size / seconds
    text = (
        f"{format_bytes(size)} in {1e3 * seconds:.1f} ms ({format_bytes(rate)}/s on the bus), "
        f"barrier {1e3 * barrier:.2f} ms"
    )
    if context.has_gpu and len(set(context.nodes)) > 1 and rate < SLOW_BYTES_PER_SECOND:
        advice = "NCCL_DEBUG=INFO shows which network it uses; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose one"
        return Result(f"{text}: slow between nodes; {advice}", WARNING)
    return Result(text)


def run_folder(context: Context) -> Result | None:
    """Check that all nodes see and write the same run folder, and that file locks work between nodes."""
    processes, run_dir = context.processes, context.run.directory
    with ExitStack() as stack:
        name, has_locks = processes.on_first(lambda: stack.enter_context(_trial_folder(run_dir)))
        try:
            result = _inspect(context, run_dir / name, has_locks)
        finally:
            processes.gather(None)  # the first process removes the folder only after all have looked
    return result


@contextmanager
def _trial_folder(run_dir: Path) -> Iterator[tuple[str, bool]]:
    """Make a folder with a lease and a held lock in the run folder; yield (its name, whether locks work)."""
    folder = run_dir / f".doctor-{secrets.token_hex(8)}"
    with temporary_folder(run_dir):
        folder.mkdir()
        try:
            (folder / "lease.json").write_text(folder.name)
            with locked(folder / "lock", 0.0) as has_locks:
                yield folder.name, has_locks
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def temporary_folder(folder: Path) -> Iterator[None]:
    """Make `folder` with its parents; afterwards remove those that did not exist, if they are empty."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in missing:
            try:
                path.rmdir()
            except OSError:
                break


def _inspect(context: Context, folder: Path, has_locks: bool) -> Result | None:
    """Look at the trial folder from this node, through its first process."""
    if not context.is_first_of_node:
        return None
    check_shared(folder, folder.name, SHARED_FOLDER_TIMEOUT_SECONDS)
    (folder / f"written-by-{context.processes.rank}").write_bytes(b"x")
    run_dir = folder.parent
    lease = "only the heartbeat of the lease protects the run: start no second job in this folder by hand"
    if not has_locks:
        return Result(f"{run_dir}: shared, but its file system has no locks; {lease}", WARNING)
    if not context.processes.is_first:
        with locked(folder / "lock", 0.0) as acquired:
            if acquired:  # although the first process holds it
                return Result(f"{run_dir}: shared, but locks do not reach from node to node; {lease}", WARNING)
    return Result(f"{run_dir}: seen and written by all nodes, with locks")


def _seconds_of(context: Context, action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    if context.has_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


CHECKS = (Check("all-reduce", all_reduce), Check("speed", speed))
CHECKS_OF_RUN = (Check("run folder", run_folder),)


class TrialSteps:
    """The checks of `--step`, in order: build the engine, then train each stage on random codes, at its batch size."""

    def __init__(self, context: Context, stages: Sequence[Stage]):
        self.context, self.stages = context, stages
        self.engine: TrainingEngine | None = None

    def checks(self) -> list[Check]:
        """Return the checks: one of the engine, and one of each stage."""
        steps = [Check(f"step, side {s.patch_side}", partial(self._guarded, self._step, s)) for s in self.stages]
        return [Check("engine", partial(self._guarded, self._build, self.stages[0])), *steps]

    def _guarded(self, action: Callable[[Stage], Result], stage: Stage, _: Context) -> Result:
        """Return what `action` returns, a failure if memory runs out."""
        try:
            return action(stage)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        total = format_bytes(_total_bytes(self.context))
        return Result(
            f"out of memory ({total}) at patch side {stage.patch_side} with {stage.micro_batch_size} images at a time; "
            f"lower schedule.micro_batch_size, set deepspeed.config=zero3, use more processes or a smaller model",
            FAILURE,
            permanent=True,
        )

    def _build(self, stage: Stage) -> Result:
        config = self.context.run
        logging = config.logging.model_copy(update={"monitors": []})  # monitors would write into the run folder
        self.engine = TrainingEngine(config.model_copy(update={"logging": logging}), stage, self.context.processes)
        return self._with_peak(f"{config.model.parameters() / 1e6:.1f}M parameters, {config.deepspeed.config}")

    def _step(self, stage: Stage) -> Result:
        assert self.engine is not None
        if self.context.has_gpu:
            torch.cuda.reset_peak_memory_stats()
        accumulated = stage.batch_size // (stage.micro_batch_size * self.context.processes.world_size)
        batches = [self._random_batch(stage)] * min(MICRO_BATCHES, accumulated)
        self.engine.set_stage(stage)
        self.engine.step(0, batches, 0.0)  # the first step also allocates buffers
        start = time.perf_counter()
        result = self.engine.step(1, batches, 0.0)
        loss = result.loss.item()  # waits for the device
        seconds = (time.perf_counter() - start) * accumulated / len(batches)
        if not result.was_applied:
            return Result(f"the loss is {loss}, expected a finite one with finite gradients", FAILURE)
        most = "at most " if accumulated > len(batches) else ""
        at_a_time = f"{stage.micro_batch_size} images at a time"
        return self._with_peak(f"{most}{seconds:.2f} s for {stage.batch_size} images, {at_a_time}")

    def _with_peak(self, text: str) -> Result:
        peak, total = _peak_bytes(self.context), _total_bytes(self.context)
        return Result(f"{text}; {format_bytes(peak)} of {format_bytes(total)} at the peak")

    def _random_batch(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """Return random codes[b, N, k] and labels[b] of one micro-batch."""
        model, count = self.context.run.model, stage.micro_batch_size
        codes = torch.randint(model.vocab_size, (count, model.grid_size**2))
        return group(codes, stage.patch_side), torch.randint(model.num_classes + 1, (count,))


def _peak_bytes(context: Context) -> int:
    """Return the peak memory: on a GPU of this stage, with the allocator's cache; on a CPU of the process so far."""
    if context.has_gpu:
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _total_bytes(context: Context) -> int:
    if context.has_gpu:
        return torch.cuda.mem_get_info(context.processes.device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
