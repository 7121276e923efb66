"""The doctor from top to bottom: join the process group, run the checks on every process, print one table.

Every process runs the same checks in the same order and sends each result to the first one through the rendezvous
store, which works even if collectives fail or hang. So no process waits for one that has failed.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from threading import Timer
from typing import Any

import torch.distributed as dist

from npp_ds.config.load import load_run
from npp_ds.distributed.environment import host_name, read_environment
from npp_ds.distributed.process_group import RENDEZVOUS_TIMEOUT, Processes, join_processes
from npp_ds.doctor import collectives, local
from npp_ds.doctor.checks import FAILURE, NOT_RUN, OK, WARNING, Check, Context, Result, Row, row_of
from npp_ds.doctor.collectives import TrialSteps
from npp_ds.errors import RendezvousError, UserError
from npp_ds.utils.format import counted, make_table, plain_text
from npp_ds.utils.screen import say

CHECK_TIMEOUT_SECONDS = 180.0  # Python starts slowly from a busy shared file system
STEP_TIMEOUT_SECONDS = 900.0
CONNECT_TIMEOUT_SECONDS = RENDEZVOUS_TIMEOUT.total_seconds() + CHECK_TIMEOUT_SECONDS  # to meet, and to connect NCCL
CLOSE_TIMEOUT_SECONDS = 5.0
RETRYABLE, USER_ERROR = 1, 2
"""Exit codes: another start may succeed; the user must fix something first."""
STYLES = {OK: "green", WARNING: "yellow", FAILURE: "bold red", NOT_RUN: "dim"}


@dataclass(frozen=True)
class Request:
    """What to check: only the machine if there is no recipe and no file; with `step`, also training steps."""

    recipe: str | None = None
    file: Path | None = None
    overrides: tuple[str, ...] = ()
    step: bool = False
    as_json: bool = False

    @property
    def names_run(self) -> bool:
        return self.recipe is not None or self.file is not None


def run_doctor(request: Request) -> int:
    """Print the table on the first process and return the exit code, the same on all; the process group stays joined.

    The code is 0 if nothing would stop the run, USER_ERROR for a problem in settings or data, and RETRYABLE for one of
    a machine or between processes, which another start, perhaps on other nodes, may not have.

    Raises UserError for a request that names no run but needs one.
    """
    if not request.names_run and (request.step or request.overrides):
        raise UserError("--step and key=value need a run: add --recipe NAME or --config FILE", on_all_ranks=True)
    start = time.perf_counter()
    # A collective that no other process joins then raises an exception and does not end this process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    try:
        # A process without its GPU would join with gloo, while the others would wait for it in NCCL.
        if reason := local.missing_gpu(read_environment().local_rank):
            _report_alone(reason, request.as_json)
            return RETRYABLE
        with _exit_after(CONNECT_TIMEOUT_SECONDS, request.as_json):
            processes = join_processes(timedelta(seconds=CHECK_TIMEOUT_SECONDS))
    except UserError as error:
        _report_alone(str(error), request.as_json, permanent=True)
        return USER_ERROR
    except RuntimeError as error:
        _report_alone(_why_not_joined(error), request.as_json)
        return RETRYABLE
    seconds = time.perf_counter() - start
    try:
        return Runner(request, processes).run(seconds)
    except RuntimeError as error:  # raised by the store: the first process has ended and reports the reason itself
        _report_alone(f"the first process does not answer ({error})", request.as_json)
        return RETRYABLE


class StoreExchange:
    """Gather and broadcast JSON values through the rendezvous store. All processes call the same methods in order."""

    _created = count()  # a process group may use a second one

    def __init__(self, processes: Processes):
        self.rank, self.world_size = processes.rank, processes.world_size
        # torch has no public name for the store of the process group, and another store would need another port.
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"doctor-{next(self._created)}", store)
        self._round = 0

    def gather(self, value: Any, timeout: float = CHECK_TIMEOUT_SECONDS) -> list[Any]:
        """Return all values by rank on the first process, None for those missing after `timeout` seconds; else []."""
        self._round += 1
        self._store.set(f"{self._round}/{self.rank}", json.dumps(value))
        if self.rank:
            return []
        deadline = time.monotonic() + timeout
        return [self._read(f"{self._round}/{rank}", deadline) for rank in range(self.world_size)]

    def broadcast(self, value: Any, timeout: float = CHECK_TIMEOUT_SECONDS) -> Any:
        """Return the value of the first process on all. Raises RuntimeError if none arrives in `timeout` seconds."""
        self._round += 1
        key = f"{self._round}/first"
        if self.rank == 0:
            self._store.set(key, json.dumps(value))
            return value
        self._store.wait([key], timedelta(seconds=timeout))
        return json.loads(self._store.get(key))

    def close(self) -> None:
        """Let the first process, which holds the store, wait a moment until the others no longer need it."""
        done = self._store.add("done", 1)
        deadline = time.monotonic() + CLOSE_TIMEOUT_SECONDS
        while self.rank == 0 and done < self.world_size and time.monotonic() < deadline:
            time.sleep(0.02)
            done = self._store.add("done", 0)

    def _read(self, key: str, deadline: float) -> Any:
        try:
            self._store.wait([key], timedelta(seconds=max(0.1, deadline - time.monotonic())))
        except RuntimeError:
            return None
        return json.loads(self._store.get(key))


class Runner:
    """Run the checks of one process; on the first process, collect the rows and print them."""

    def __init__(self, request: Request, processes: Processes):
        self.request, self.processes = request, processes
        self.exchange = StoreExchange(processes)
        self.nodes: list[str] = self.exchange.broadcast(self.exchange.gather(host_name()))
        self.context = Context(processes, self.nodes)
        self.rows: list[Row] = []

    def run(self, connect_seconds: float) -> int:
        """Run all checks, print the table on the first process, and return the exit code, the same on all."""
        joined = Check("processes", lambda _: self._joined(connect_seconds))
        # Imports on a slow file system are part of the first round.
        has_failed = self._round([joined, *self._local_checks()], RENDEZVOUS_TIMEOUT.total_seconds())
        checks = [*collectives.CHECKS, *(collectives.CHECKS_OF_RUN if self.request.names_run else ())]
        has_failed = self._one_by_one(checks, CHECK_TIMEOUT_SECONDS, has_failed)
        if self.request.step and not has_failed:
            stages = self.processes.on_first(lambda: self.context.schedule).stages
            self._one_by_one(TrialSteps(self.context, stages).checks(), STEP_TIMEOUT_SECONDS, has_failed)
        code = 0
        if self.processes.is_first:
            code = _print(self.rows, self.processes.world_size, len(set(self.nodes)), self.request.as_json)
        # A launcher kills all processes once one has failed, so none ends before the table is printed.
        code = self.exchange.broadcast(code)
        self.exchange.close()
        return code

    def _joined(self, seconds: float) -> Result:
        if self.processes.world_size == 1:
            return Result("a single one")
        return Result(f"{self.processes.world_size} met at {_address()} in {seconds:.1f} s")

    def _local_checks(self) -> list[Check]:
        if not self.request.names_run:
            return list(local.CHECKS)
        config = Check("config", self._read_config, permanent=True)
        return [*local.CHECKS, config, *(_with_config(check) for check in local.CHECKS_OF_RUN)]

    def _read_config(self, context: Context) -> None:
        context.config = load_run(self.request.recipe, self.request.file, self.request.overrides)

    def _one_by_one(self, checks: Sequence[Check], timeout: float, has_failed: bool) -> bool:
        """Run checks that all processes make together, until one fails; return whether any check has failed so far."""
        for check in checks:
            if has_failed:
                self.rows.append(Row(check.name, NOT_RUN, "skipped; fix the failures above first"))
            else:
                has_failed = self._round([check], timeout)
        return has_failed

    def _round(self, checks: Sequence[Check], timeout: float) -> bool:
        """Run checks, add their rows on the first process, and return on all whether any check has failed so far."""
        results = [check.run(self.context) for check in checks]
        answers = self.exchange.gather([asdict(result) if result else None for result in results], timeout)
        for index, check in enumerate(checks):
            of_ranks = [Result(**answer[index]) if answer and answer[index] else None for answer in answers]
            if row := row_of(check, of_ranks, self.nodes):
                self.rows.append(row)
        for rank, answer in enumerate(answers):
            if answer is None:
                text = f"no answer within {timeout:g} s: it has died or hangs"
                self.rows.append(Row(checks[-1].name, FAILURE, text, self.nodes[rank], rank))
        return self.exchange.broadcast(any(row.state == FAILURE for row in self.rows), timeout + CHECK_TIMEOUT_SECONDS)


def _with_config(check: Check) -> Check:
    """Return the check, which does nothing if the config could not be read."""
    return replace(check, find=lambda context: check.find(context) if context.config else None)


@contextmanager
def _exit_after(seconds: float, as_json: bool) -> Iterator[None]:
    """End this process if the block takes longer than `seconds`: connecting NCCL has no timeout of its own."""

    def end() -> None:
        _report_alone(f"not connected to all at {_address()} within {seconds:g} s; see NCCL_DEBUG=INFO", as_json)
        os._exit(RETRYABLE)

    timer = Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _print(rows: Sequence[Row], processes: int, nodes: int, as_json: bool) -> int:
    """Print the table, or JSON, and the last line; return the exit code."""
    failures, warnings = ([row for row in rows if row.state == state] for state in (FAILURE, WARNING))
    if as_json:
        result = FAILURE if failures else WARNING if warnings else OK
        checks = [asdict(row) for row in rows]
        print(json.dumps({"result": result, "processes": processes, "nodes": nodes, "checks": checks}))
    else:
        _print_table(rows)
    if failures:
        _print_error(failures)
    elif not as_json:
        verdict = f"{counted(len(warnings), 'warning')}, nothing that stops a run" if warnings else "all checks passed"
        say(f"{verdict}: {counted(processes, 'process')} on {counted(nodes, 'node')}")
    return 0 if not failures else USER_ERROR if any(row.permanent for row in failures) else RETRYABLE


def _print_table(rows: Sequence[Row]) -> None:
    """Print a table on a terminal; elsewhere a line per row, which no width cuts."""
    columns = ("check", "result", "detail")
    if sys.stdout.isatty():
        from rich.console import Console

        cells = [(row.name, plain_text(row.state, STYLES[row.state]), row.text) for row in rows]
        Console().print(make_table(columns, cells, justify="left"))
        return
    lines = [columns, *((row.name, row.state, row.text) for row in rows)]
    name_width, state_width, _ = (max(map(len, cells)) for cells in zip(*lines, strict=True))
    for name, state, detail in lines:
        say(f"{name:<{name_width}}  {state:<{state_width}}  {detail}")


def _print_error(failures: Sequence[Row]) -> None:
    """Print one line: the first of the failures that decide the exit code."""
    first, more = min(failures, key=lambda row: not row.permanent), len(failures) - 1
    others = f" (and {counted(more, 'more failure')} above)" if more else ""
    sys.stdout.flush()
    text = f"error: host {first.node} (rank {first.rank}): {first.name}: {first.detail}{others}"
    say(text, to_stderr=True)


def _report_alone(reason: str, as_json: bool, permanent: bool = False) -> None:
    """Print a failure on a process that cannot reach the others."""
    process = read_environment()
    row = Row("processes", FAILURE, reason, host_name(), process.rank, permanent)
    if process.rank == 0:
        _print([row], process.world_size, 1, as_json)
    else:
        _print_error([row])


def _why_not_joined(error: RuntimeError) -> str:
    text = " ".join(str(error).split())
    if "EADDRINUSE" in text:
        return f"{_address()}: the port is taken by another program; set MASTER_PORT to a free one"
    if isinstance(error, RendezvousError):
        return f"{text}; check that all were started, and that every node can reach this address and port"
    return f"met at {_address()}, but not connected: {type(error).__name__}: {text[:300]}"


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR', 'this process')}:{os.environ.get('MASTER_PORT', '')}".rstrip(":")
