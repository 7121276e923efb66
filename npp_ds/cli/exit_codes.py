"""Exit codes, and how a command reports an error on standard error.

| code | meaning |
|---|---|
| 0 | done |
| 1 | a crash, or the processes of a launch did not meet; another start may succeed |
| 2 | the user must fix something: the message says what |
| 3 | the loss or the gradients were not finite (`NON_FINITE`) |
| 4 | a process stalled: its stacks are in stalled.txt (training/watchdog.py) |
| 75 | a signal asked the run to stop and it saved: rerun the same command to resume (training/preemption.py) |
"""

import io
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from npp_ds.distributed.environment import ProcessInfo, host_name, read_environment
from npp_ds.errors import RendezvousError, UserError, as_user_error
from npp_ds.utils.format import printable
from npp_ds.utils.screen import show_logs

FAILED, USER_ERROR, NON_FINITE = 1, 2, 3


def exit_code_of(action: Callable[[], object]) -> int:
    """Run `action()` and return 0, USER_ERROR for what a user can fix, or FAILED if processes have lost each other.

    Both are printed as one line: also a full disk, missing rights, used-up memory (see `as_user_error`). If all
    processes raise the same UserError, one of them prints it; else each names its rank and host. A programming error is
    raised in a lone process; among several, its traceback is printed with rank and host, and the code is FAILED.
    """
    process, who = ProcessInfo(), ""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal's encoding lacks is printed escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        process = read_environment()
        if process.world_size > 1:
            who = f"rank {process.rank}, host {host_name()}"
        show_logs(process.rank, to_stderr=True)
        action()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and error.filename is None:  # nobody reads what is printed, as in | head
            sys.stdout = None  # or Python would complain at exit
            return FAILED
        if found := as_user_error(error):
            on_all_ranks = isinstance(found, UserError) and found.on_all_ranks
            names_itself = on_all_ranks or isinstance(error, RendezvousError)
            if process.rank == 0 or not on_all_ranks:
                text = f"error ({who}): {found}" if who and not names_itself else f"error: {found}"
                print_error("\n".join(map(printable, re.split("\n(?=  )", text))))  # a list of problems is indented
            return USER_ERROR if isinstance(found, UserError) else FAILED
        if not who:
            raise
        lines = traceback.format_exc().splitlines(keepends=True)
        print_error("".join(f"[{who}] {line}" for line in lines).rstrip())
        return FAILED
    return 0


def exit_now(code: int) -> NoReturn:
    """End the process at once, with what it has printed but without Python's cleaning up at exit."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def print_error(text: str) -> None:
    """Write to standard error in one piece, so that the messages of several processes do not mix.

    Characters of names that would control the terminal are escaped.
    """
    with suppress(OSError):
        sys.stderr.write(printable(text, keep="\n\t") + "\n")
        sys.stderr.flush()
