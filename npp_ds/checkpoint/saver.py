"""Save checkpoints. Training either waits for a save or continues while a thread writes; the protocol is the same.

1. Every rank writes its file into `step-XXXXXXXX.TOKEN.tmp` and hashes it meanwhile.
2. When all ranks have written, the first rank checks that the run folder still belongs to this run, writes
   COMPLETE.json and renames the folder to `step-XXXXXXXX`.
3. It then replaces the file `latest`.

If a file cannot be written, for example on a full disk, only this checkpoint is lost.
"""

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from npp_ds.checkpoint.folders import CheckpointRecord, find_problem, folder_of, write_latest, write_record
from npp_ds.checkpoint.rank_files import Fragment, file_of, write_state
from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.utils.files import fsync_directory


class Lease(Protocol):
    """The right to write into the run folder."""

    def check(self) -> None:
        """Raise UserError when another start has taken it."""


class SaveFailed(Exception):
    """A checkpoint could not be written; earlier ones are unchanged. Raised alike on all ranks."""


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: its record with all files, and the seconds for which it paused training."""

    record: CheckpointRecord
    seconds_waited: float

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(entry["bytes"] for entry in self.record.files.values())


class CheckpointSaver:
    """Save one checkpoint at a time with `begin`, then `finish`. All ranks call both together. A thread writes.

    `token` makes the names of temporary folders unique. The first rank checks the `lease` right before the commit. With
    `asynchronous`, `begin` copies the states to host memory and training may continue until `writing` is done; without
    it, the states must not change between `begin` and `finish`. `progress` is set while ranks wait for each other and
    one of them writes. `pending` is the record of the checkpoint that has begun and is not finished, else None.
    """

    def __init__(
        self,
        checkpoints: Path,
        processes: Processes,
        token: str,
        lease: Lease | None = None,
        progress: threading.Event | None = None,
        asynchronous: bool = False,
    ):
        self.checkpoints, self.processes, self.token = checkpoints, processes, token
        self.lease, self.progress, self.asynchronous = lease, progress or threading.Event(), asynchronous
        self._thread = ThreadPoolExecutor(1, "npp-checkpoint")
        self._host: dict[str, list[Tensor]] = {}
        self.pending: CheckpointRecord | None = None
        self.writing: Future | None = None
        self._blocks = 0
        self._seconds = 0.0

    def begin(self, record: CheckpointRecord, fragments: list[Fragment], states: dict[str, list[Tensor]]) -> None:
        """Start to write this rank's `fragments` of every state. Raises SaveFailed on all ranks."""
        if self.pending is not None:
            raise RuntimeError(f"the checkpoint of step {self.pending.step} is not finished")
        began = time.perf_counter()
        if problem := self.processes.on_first(self._make_folder, record.step):
            raise SaveFailed(problem)
        path = self._folder(record.step) / file_of(self.processes.rank, self.processes.world_size)
        self.pending = record
        try:
            states = self._copied_to_host(states) if self.asynchronous else states
            self.writing = self._thread.submit(write_state, path, fragments, states, self._count_block)
        except Exception as error:  # `finish` reports it to all ranks
            self.writing = Future()
            self.writing.set_exception(error)
        self._seconds = time.perf_counter() - began

    def finish(self) -> Saved:
        """Wait until all ranks have written, then commit.

        Raises SaveFailed, or UserError for a lost lease, on all ranks.

        Without `begin` it raises RuntimeError.
        """
        record, writing = self.pending, self.writing
        if record is None or writing is None:
            raise RuntimeError("no checkpoint has begun")
        began = time.perf_counter()
        self._wait_for_all(writing)
        self.pending = self.writing = None
        results = self.processes.gather(self._result(writing))
        names = [file_of(rank, self.processes.world_size) for rank in range(len(results))]
        problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(results) if problem]
        written = {name: entry for name, (entry, _) in zip(names, results, strict=True)}
        complete = record if problems else replace(record, files=written)
        problem = self.processes.on_first(self._discard if problems else self._commit, complete)
        if problems or problem:
            raise SaveFailed("; ".join(problems) or problem)
        return Saved(complete, self._seconds + time.perf_counter() - began)

    def afterwards(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Run `action(*arguments)` in the writing thread, after what it is writing now."""
        self._thread.submit(action, *arguments)

    def close(self) -> None:
        """Wait for the thread and end it."""
        self._thread.shutdown()

    def _wait_for_all(self, writing: Future) -> None:
        """Return when every rank has written. `progress` is not set while no rank writes another block."""
        before = -1.0
        while True:
            state = torch.tensor([float(writing.done()), float(self._blocks)], device=self.processes.device)
            written, blocks = self.processes.sum(state)
            if blocks != before:
                self.progress.set()
            if written == self.processes.world_size:
                return
            before = blocks
            wait([writing], timeout=0.2)

    def _count_block(self) -> None:
        self._blocks += 1

    def _folder(self, step: int) -> Path:
        folder = folder_of(self.checkpoints, step)
        return folder.with_name(f"{folder.name}.{self.token}.tmp")

    def _make_folder(self, step: int) -> str | None:
        folder = self._folder(step)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        except OSError as error:
            return f"{folder}: {error.strerror}"
        return None

    def _copied_to_host(self, states: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Copy the states to host memory, which is kept for the next checkpoint and pinned if there is a GPU."""
        if not self._host:
            self._host = {
                state: [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in tensors]
                for state, tensors in states.items()
            }
        for state, tensors in states.items():
            for copy, tensor in zip(self._host[state], tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._host

    def _result(self, writing: Future) -> tuple[dict | None, str | None]:
        """Return (the file's entry in the record, None), or (None, why the file could not be written)."""
        error = writing.exception()
        if error is None:
            return writing.result(), None
        if isinstance(error, OSError):
            return None, f"{error.filename or self.checkpoints}: {error.strerror}"
        return None, f"{type(error).__name__}: {error}"

    def _discard(self, record: CheckpointRecord) -> None:
        shutil.rmtree(self._folder(record.step), ignore_errors=True)

    def _commit(self, record: CheckpointRecord) -> str | None:
        temporary, folder = self._folder(record.step), folder_of(self.checkpoints, record.step)
        incomplete = folder.with_name(f"{folder.name}.{self.token}.incomplete.tmp")
        try:
            write_record(temporary, record)
            fsync_directory(temporary)
            if self.lease:
                self.lease.check()
            if folder.exists() and find_problem(folder) is not None:
                folder.rename(incomplete)
            if not folder.exists():  # else another start of this run has committed the same step
                temporary.rename(folder)
            fsync_directory(self.checkpoints)
        except (OSError, UserError) as error:
            self._discard(record)
            if isinstance(error, UserError):
                raise
            return f"{error.filename or temporary}: {error.strerror}"
        write_latest(self.checkpoints, folder)
        for leftover in (incomplete, temporary):
            shutil.rmtree(leftover, ignore_errors=True)
        return None
