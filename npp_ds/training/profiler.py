"""A profile of some optimizer steps of a run: a trace for a viewer, and a table of what took the time."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryDirectory
from typing import BinaryIO

from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function

from npp_ds.config.schema import RunConfig
from npp_ds.data.loader import StageLoader, StepBatch
from npp_ds.distributed.process_group import Processes
from npp_ds.training.run_log import RunLog
from npp_ds.utils.files import write_atomic, write_text_atomic

logger = logging.getLogger(__name__)

PROFILE_DIR = "profile"
TABLE_ROWS = 50


class StepProfiler:
    """Profile the steps that `profile.steps` names, on the first rank; on all others do nothing.

    Steps are numbered as in metrics.jsonl, from 1. The step before the first of them, where this start makes it, warms
    the profiler up. The time that profiling itself takes does not count as training time.
    """

    def __init__(self, config: RunConfig, processes: Processes, log: RunLog):
        self._folder, self._rank = config.directory / PROFILE_DIR, processes.rank
        self._steps = config.profile.numbers() if processes.is_first else range(0)
        self._log = log
        self._on_gpu = processes.device.type == "cuda"
        if self._steps and not self._on_gpu:  # else the profiler's library warns that there is no GPU
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._first = self._number = 0  # steps of this start: its first one, and that in progress
        self._profiler: profile

    @contextmanager
    def profiling(self, first_step: int) -> Iterator[None]:
        """Profile the batches of `around` inside the block, which trains from the step after `first_step` steps.

        A block that ends before the last step to profile writes the trace so far.
        """
        if not self._steps:
            yield
            return
        self._first = self._number = first_step + 1
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._profiler = profile(activities=activities, schedule=self._action, on_trace_ready=self._write_or_warn)
        with self._log.clock.paused():
            self._profiler.start()
        try:
            yield
        finally:
            with self._log.clock.paused():
                self._profiler.stop()

    def around(self, loader: StageLoader) -> Iterator[StepBatch]:
        """Yield the batches of a loader; a step lasts until the next batch is asked for."""
        return self._profiled(loader) if self._steps else loader

    def _profiled(self, loader: StageLoader) -> Iterator[StepBatch]:
        while len(loader):
            with record_function(f"step {self._number}"):
                with record_function("data"):
                    batch = next(loader)
                yield batch
            with self._log.clock.paused():
                self._profiler.step()
            self._number += 1

    def _action(self, index: int) -> ProfilerAction:
        """Return what the profiler does in a step, counted from 0 in this start."""
        number = self._first + index
        if number in self._steps:
            return ProfilerAction.RECORD_AND_SAVE if number == self._steps[-1] else ProfilerAction.RECORD
        return ProfilerAction.WARMUP if number + 1 in self._steps else ProfilerAction.NONE

    def _write_or_warn(self, profiler: profile) -> None:
        """Write the trace of the steps up to that in progress; a full disk is no reason to lose a run."""
        steps = [number for number in self._steps if self._first <= number <= self._number]
        try:
            self._write(profiler, steps)
        except (OSError, RuntimeError) as error:
            logger.warning(f"the profile could not be written: {error}; the run continues")

    def _write(self, profiler: profile, steps: list[int]) -> None:
        self._folder.mkdir(exist_ok=True)
        name = f"steps-{steps[0]}-{steps[-1]}-rank-{self._rank}"
        trace, table = self._folder / f"{name}.json", self._folder / f"{name}.txt"
        write_atomic(trace, lambda file: _export(profiler, file))
        by = f"self_{'device' if self._on_gpu else 'cpu'}_time_total"
        head = f"optimizer steps {steps[0]} to {steps[-1]}, rank {self._rank}: operations by their own time\n"
        averages = profiler.key_averages()
        text = averages.table(sort_by=by, row_limit=TABLE_ROWS, max_name_column_width=80)
        write_text_atomic(table, head + text)
        logger.info(f"profile of steps {steps[0]} to {steps[-1]}: {trace} for ui.perfetto.dev; as a table: {table}")


def _export(profiler: profile, file: BinaryIO) -> None:
    """Write the trace in Chrome's JSON format; torch writes to a path of its own beside the one it is given."""
    with TemporaryDirectory(prefix=".trace-", dir=Path(file.name).parent) as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        with open(path, "rb") as trace:
            copyfileobj(trace, file)
