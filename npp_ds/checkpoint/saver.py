"""How a checkpoint comes to be: one protocol, whether training waits for it or goes on meanwhile.

Every rank writes its file into `step-XXXXXXXX.TOKEN.tmp`, hashing as it writes. When all are done, the first rank makes
sure that the run folder is still ours, writes `COMPLETE.json`, renames the folder to `step-XXXXXXXX` and then replaces
`latest`. A file that cannot be written (a full disk) costs this checkpoint, not the earlier ones.
"""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from npp_ds.checkpoint.folders import CheckpointRecord, folder_of, what_is_wrong, write_record
from npp_ds.checkpoint.rank_files import Fragment, file_of, write_state
from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.utils.files import fsync_directory, write_text_atomic


class Lease(Protocol):
    """The right to write into the run folder."""

    def check(self) -> None:
        """Raises UserError when another start has taken it."""


class Watchdog(Protocol):
    """What ends a process that makes no progress."""

    def beat(self) -> None:
        """Report progress."""


class SaveFailed(Exception):
    """A checkpoint could not be written; the earlier ones are as they were. The same on all ranks."""


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: its record with all files, and the seconds that training stood still for it."""

    record: CheckpointRecord
    seconds_waited: float

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.record.files.values())


class CheckpointSaver:
    """Saves one checkpoint at a time: `begin`, then `finish`; all ranks call both together. A thread writes.

    `token` names temporary folders. The first rank checks the `lease` right before the commit. `asynchronous`: `begin`
    copies to host memory, so training may continue until `writing` is done; otherwise nothing may change between
    `begin` and `finish`. The `watchdog` hears of progress while ranks wait for each other.
    """

    def __init__(
        self,
        checkpoints: Path,
        processes: Processes,
        token: str,
        lease: Lease | None = None,
        watchdog: Watchdog | None = None,
        asynchronous: bool = False,
    ):
        self.checkpoints, self.processes, self.token = checkpoints, processes, token
        self.lease, self.watchdog, self.asynchronous = lease, watchdog, asynchronous
        self._thread = ThreadPoolExecutor(1, "npp-checkpoint")
        self._host: dict[str, list[Tensor]] = {}
        self._record: CheckpointRecord | None = None
        self.writing: Future | None = None
        self._blocks = 0
        self._seconds = 0.0

    @property
    def pending(self) -> CheckpointRecord | None:
        """The record of the checkpoint that has begun and is not finished."""
        return self._record

    def begin(self, record: CheckpointRecord, fragments: list[Fragment], kinds: dict[str, list[Tensor]]) -> None:
        """Starts to write this rank's `fragments` of every kind. Raises SaveFailed on all ranks."""
        if self._record is not None:
            raise RuntimeError(f"the checkpoint of step {self._record.step} is not finished")
        began = time.perf_counter()
        if problem := self.processes.on_first(self._make_folder, record.step):
            raise SaveFailed(problem)
        path = self._folder(record.step) / file_of(self.processes.rank, self.processes.world_size)
        self._record = record
        try:
            kinds = self._copied_to_host(kinds) if self.asynchronous else kinds
            self.writing = self._thread.submit(write_state, path, fragments, kinds, self._count_block)
        except Exception as error:  # told to all ranks by `finish`
            self.writing = Future()
            self.writing.set_exception(error)
        self._seconds = time.perf_counter() - began

    def finish(self) -> Saved:
        """Wait for all ranks' parts and commit. Raises SaveFailed, or UserError for a lost lease, on all ranks."""
        record, writing = self._record, self.writing
        if record is None or writing is None:
            raise RuntimeError("no checkpoint has begun")
        began = time.perf_counter()
        self._wait_for_all(writing)
        self._record = self.writing = None
        outcomes = self.processes.gather(self._outcome(writing))
        names = [file_of(rank, self.processes.world_size) for rank in range(len(outcomes))]
        problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(outcomes) if problem]
        complete = replace(record, files={name: entry for name, (entry, _) in zip(names, outcomes, strict=True)})
        problem = self.processes.on_first(self._discard if problems else self._commit, complete)
        if problems or problem:
            raise SaveFailed("; ".join(problems) or problem)
        return Saved(complete, self._seconds + time.perf_counter() - began)

    def afterwards(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Lets the writing thread do something when it has nothing to write."""
        self._thread.submit(action, *arguments)

    def close(self) -> None:
        self._thread.shutdown()

    def _wait_for_all(self, writing: Future) -> None:
        """Returns when every rank has written; a rank that stands still lets the beat of all fall silent."""
        before = -1.0
        while True:
            state = torch.tensor([float(writing.done()), float(self._blocks)], device=self.processes.device)
            written, blocks = self.processes.sum(state)
            if blocks != before and self.watchdog:
                self.watchdog.beat()
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

    def _copied_to_host(self, kinds: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Copies in host memory that stays for the next checkpoint, pinned where there is a GPU."""
        if not self._host:
            self._host = {
                kind: [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in tensors]
                for kind, tensors in kinds.items()
            }
        for kind, tensors in kinds.items():
            for copy, tensor in zip(self._host[kind], tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._host

    def _outcome(self, writing: Future) -> tuple[dict | None, str | None]:
        """(the file's entry, None), or (None, why there is none)."""
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
        torn = folder.with_name(f"{folder.name}.{self.token}.torn.tmp")
        try:
            write_record(temporary, record)
            fsync_directory(temporary)
            if self.lease:
                self.lease.check()
            if folder.exists() and what_is_wrong(folder) is not None:
                folder.rename(torn)
            if not folder.exists():  # else whoever made it was at the same step of the same run
                temporary.rename(folder)
            fsync_directory(self.checkpoints)
        except (OSError, UserError) as error:
            self._discard(record)
            if isinstance(error, UserError):
                raise
            return f"{error.filename or temporary}: {error.strerror}"
        with suppress(OSError):  # for people only
            write_text_atomic(self.checkpoints / "latest", folder.name)
        for leftover in (torn, temporary):
            shutil.rmtree(leftover, ignore_errors=True)
        return None
