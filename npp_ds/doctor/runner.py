"""The examination from top to bottom: meet, look at this process, compare, then what only all can try together.

Every process goes through the same rounds and tells the first one what it found, through the rendezvous store: what is
wrong on one of them is told once, and nobody waits for a process that has given up.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from threading import Timer

from npp_ds.config.load import load_config
from npp_ds.distributed.environment import host_name, read_environment
from npp_ds.distributed.process_group import RENDEZVOUS_TIMEOUT, Processes, join_processes
from npp_ds.doctor import collectives, machine, run
from npp_ds.doctor.context import Context
from npp_ds.doctor.exchange import PATIENCE_SECONDS, Exchange
from npp_ds.doctor.outcome import FAILURE, NOT_RUN, OK, WARNING, Answer, Check, Outcome, Row, merged
from npp_ds.doctor.table import print_json, print_rows
from npp_ds.doctor.trial_steps import TrialSteps
from npp_ds.errors import RendezvousError, UserError

CONNECT_SECONDS = RENDEZVOUS_TIMEOUT.total_seconds() + PATIENCE_SECONDS  # to meet, then to connect through NCCL
STEP_PATIENCE_SECONDS = 900.0
ANOTHER_START, A_PERSON = 1, 2  # exit codes: which of them can mend what was found


@dataclass(frozen=True)
class Request:
    """What to look at: without recipe and file the machine alone, with `step` also a step of the model."""

    recipe: str | None = None
    file: Path | None = None
    overrides: tuple[str, ...] = ()
    step: bool = False
    as_json: bool = False

    @property
    def names_run(self) -> bool:
        return self.recipe is not None or self.file is not None


def examine(request: Request) -> int:
    """Prints the findings on the first process and returns the exit code, the same on all; the group stays joined.

    0 when nothing stops the run; 2 when something in settings or data does, which only a person can mend; 1 when it is
    a machine, or what processes do together: another start, perhaps on other nodes, may do better.

    Raises UserError for a request that names no run and asks for one.
    """
    if not request.names_run and (request.step or request.overrides):
        raise UserError("--step and key=value are about a run: add --recipe NAME or --config FILE", on_all_ranks=True)
    began = time.perf_counter()
    # A collective that nobody answers is then an exception here, and not the end of the process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    try:
        # One without its GPU would join through gloo, and the others would wait for it in NCCL.
        if reason := machine.missing_gpu(read_environment().local_rank):
            _report_alone(reason, request.as_json)
            return ANOTHER_START
        with _ending_after(CONNECT_SECONDS, request.as_json):
            processes = join_processes(timedelta(seconds=PATIENCE_SECONDS))
    except UserError as error:
        _report_alone(str(error), request.as_json, lasting=True)
        return A_PERSON
    except RuntimeError as error:
        _report_alone(_why_not_joined(error), request.as_json)
        return ANOTHER_START
    seconds = time.perf_counter() - began
    try:
        return Examination(request, processes).run(seconds)
    except RuntimeError as error:  # of the store: the first process has gone, and says why itself
        _report_alone(f"the first process does not answer ({error})", request.as_json)
        return ANOTHER_START


class Examination:
    """One process's part."""

    def __init__(self, request: Request, processes: Processes):
        self.request, self.processes = request, processes
        self.exchange = Exchange(processes)
        self.nodes: list[str] = self.exchange.tell(self.exchange.collect(host_name()))
        self.context = Context(processes, self.nodes)
        self.rows: list[Row] = []

    def run(self, seconds_to_meet: float) -> int:
        met = Check("processes", lambda _: self._met(seconds_to_meet))
        has_failed = self._round([met, *self._local_checks()], RENDEZVOUS_TIMEOUT.total_seconds())  # they import too
        checks = [*collectives.CHECKS, *(collectives.CHECKS_OF_RUN if self.request.names_run else ())]
        has_failed = self._one_by_one(checks, PATIENCE_SECONDS, has_failed)
        if self.request.step and not has_failed:
            stages = self.processes.on_first(lambda: self.context.schedule).stages
            self._one_by_one(TrialSteps(self.context, stages).checks(), STEP_PATIENCE_SECONDS, has_failed)
        code = 0
        if self.processes.is_first:
            code = _print(self.rows, self.processes.world_size, len(set(self.nodes)), self.request.as_json)
        code = self.exchange.tell(code)  # launchers kill all once one has ended badly: not before it has printed
        self.exchange.part()
        return code

    def _met(self, seconds: float) -> Outcome:
        if self.processes.world_size == 1:
            return Outcome("one, alone")
        return Outcome(f"{self.processes.world_size} met at {_address()} in {seconds:.1f} s", margin=-seconds)

    def _local_checks(self) -> list[Check]:
        if not self.request.names_run:
            return list(machine.CHECKS)
        config = Check("config", self._read_config, lasting=True)
        return [*machine.CHECKS, config, *(_if_read(check) for check in run.CHECKS)]

    def _one_by_one(self, checks: Sequence[Check[Context]], patience: float, has_failed: bool) -> bool:
        """Makes checks that need all others to be well, as long as they are; whether one has failed so far."""
        for check in checks:
            if has_failed:
                self.rows.append(Row(check.name, NOT_RUN, "mend what has failed first"))
            else:
                has_failed = self._round([check], patience)
        return has_failed

    def _read_config(self, context: Context) -> Outcome | None:
        request = self.request
        context.config = load_config(request.recipe, request.file, request.overrides)
        return None

    def _round(self, checks: Sequence[Check[Context]], patience: float = PATIENCE_SECONDS) -> bool:
        """Makes the checks and adds their rows on the first process; whether one has failed anywhere, on all."""
        outcomes = [check.outcome(self.context) for check in checks]
        told = self.exchange.collect([asdict(outcome) if outcome else None for outcome in outcomes], patience)
        silent = [rank for rank, answer in enumerate(told) if answer is None]
        for index, check in enumerate(checks):
            answers = [
                Answer(rank, self.nodes[rank], Outcome(**answer[index]))
                for rank, answer in enumerate(told)
                if answer is not None and answer[index] is not None
            ]
            if row := merged(check, answers):
                self.rows.append(row)
        for rank in silent:
            reason = f"no answer within {patience:g} s: it has died or hangs"
            self.rows.append(Row(checks[-1].name, FAILURE, f"rank {rank}: {reason}", reason, self.nodes[rank], rank))
        return self.exchange.tell(any(row.state == FAILURE for row in self.rows), patience + PATIENCE_SECONDS)


def _if_read(check: Check[Context]) -> Check[Context]:
    """The check, once the config could be read."""
    return replace(check, examine=lambda context: check.examine(context) if context.config else None)


@contextmanager
def _ending_after(seconds: float, as_json: bool) -> Iterator[None]:
    """Ends this process when what is done meanwhile takes so long: to wait for NCCL's connections has no time limit."""

    def end() -> None:
        _report_alone(f"not connected to all at {_address()} within {seconds:g} s; see NCCL_DEBUG=INFO", as_json)
        os._exit(ANOTHER_START)

    timer = Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _print(rows: Sequence[Row], processes: int, nodes: int, as_json: bool) -> int:
    """The findings and the last line; returns the exit code."""
    failures, warnings = ([row for row in rows if row.state == state] for state in (FAILURE, WARNING))
    result = FAILURE if failures else WARNING if warnings else OK
    if as_json:
        print_json(rows, result, processes, nodes)
    else:
        print_rows(rows)
    if failures:
        _print_error(failures)
    elif not as_json:
        count = f"{len(warnings)} warning{'s' * (len(warnings) > 1)}"
        verdict = f"{count}, nothing that stops a run" if warnings else "all well"
        print(f"{verdict}: {machine.counted(processes, nodes)}", flush=True)
    return 0 if not failures else A_PERSON if any(row.lasting for row in failures) else ANOTHER_START


def _print_error(failures: Sequence[Row]) -> None:
    """One line: of the first failure that decides the exit code."""
    first, more = min(failures, key=lambda row: not row.lasting), len(failures) - 1
    others = f" (and {more} more failure{'s' * (more > 1)} above)" if more else ""
    sys.stdout.flush()
    text = f"error: host {first.node} (rank {first.rank}): {first.name}: {first.reason}{others}"
    print(text, file=sys.stderr, flush=True)


def _report_alone(reason: str, as_json: bool, lasting: bool = False) -> None:
    """What a process says that cannot ask the others."""
    place = read_environment()
    row = Row("processes", FAILURE, reason, reason, host_name(), place.rank, lasting)
    if place.rank == 0:
        _print([row], place.world_size, 1, as_json)
    else:
        _print_error([row])


def _why_not_joined(error: RuntimeError) -> str:
    text = " ".join(str(error).split())
    if "EADDRINUSE" in text:
        return f"{_address()}: the port is taken by another program; set MASTER_PORT to a free one"
    if isinstance(error, RendezvousError):
        return f"{text}; see that all were started, and that this address and port can be reached from every node"
    return f"met at {_address()}, but not connected: {type(error).__name__}: {text[:300]}"


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR', 'this process')}:{os.environ.get('MASTER_PORT', '')}".rstrip(":")
