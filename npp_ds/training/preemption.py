"""Preemption: a signal asks a run to stop; the run saves and exits with a code that asks for a restart."""

import logging
import signal
import time
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

PREEMPTED = 75
"""Exit code (EX_TEMPFAIL) of a run that was asked to stop, has saved, and resumes when started again."""


class Preempted(Exception):
    """The run was asked to stop by `signal_name` and saved after `step` steps."""

    def __init__(self, signal_name: str, step: int):
        super().__init__(signal_name, step)
        self.signal_name, self.step = signal_name, step

    def __str__(self) -> str:
        return f"asked to stop by {self.signal_name}; saved after step {self.step}; start again to resume"


ONE_PRESS = 1.0
"""Seconds in which further signals belong to the same Ctrl-C: launchers pass on what the terminal sends to all."""


class StopRequests:
    """A context in which SIGINT (Ctrl-C), SIGTERM and SIGUSR1 end nothing: `requested` names the first one.

    Later ones change nothing, except after a SIGINT: ONE_PRESS seconds later SIGINT and SIGTERM end the process at once
    again (torchrun 2.14 sends its processes SIGTERM at the second Ctrl-C). When Preempted leaves the block all stay
    ignored, so that the process ends with its own exit code. Python delivers signals to the main thread only: entered
    in another thread it raises ValueError.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested: str | None = None
        self._at_once = False
        self._interrupted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequests":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if isinstance(error, Preempted):
                handler = signal.SIG_IGN
            # None: a handler that was not installed from Python, which Python cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def end_before_meeting(self) -> None:
        """Raise Preempted if SIGINT or SIGTERM came; called while the processes of a launch wait for one another.

        After SIGUSR1 alone, a scheduler's early warning, they meet first and stop together: processes that did not
        receive it would wait for this one.
        """
        if self.requested and self._at_once:
            logger.info(f"{self.requested}: stopped before all processes had met; rerun the same command to resume")
            raise Preempted(self.requested, 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signal.Signals(number).name
        self._at_once |= number != signal.SIGUSR1
        if number == signal.SIGINT and not self._interrupted:
            self._interrupted = True
            time.sleep(ONE_PRESS)
            for fatal in (signal.SIGINT, signal.SIGTERM):
                signal.signal(fatal, signal.SIG_DFL)  # not a handler: it must not wait for Python's main thread
