"""How a command ends: what went wrong as text on standard error, with rank and host in front among several processes,
and an exit code.
"""

import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from npp_ds.distributed.environment import Place, host_of_environment, place_of_environment
from npp_ds.errors import RendezvousError, UserError
from npp_ds.utils.logs import show_logs


def exit_code_of(action: Callable[[], object]) -> int:
    """0 after `action()`, 2 after a UserError, 1 when the processes of a launch did not meet.

    A UserError that all processes raise alike is told once, others by whom they are of. Any other error is raised when
    this process is alone; among several its traceback is told line by line, and the code is 1.
    """
    place, who = Place(), ""
    try:
        place = place_of_environment()
        if place.world_size > 1:
            who = f"rank {place.rank}, host {host_of_environment()}"
        show_logs(place.rank)
        action()
    except UserError as error:
        if place.rank == 0 or not error.on_all_ranks:
            tell(f"error ({who}): {error}" if who and not error.on_all_ranks else f"error: {error}")
        return 2
    except RendezvousError as error:
        tell(f"error: {error}")
        return 1
    except Exception:
        if not who:
            raise
        tell("".join(f"[{who}] {line}" for line in traceback.format_exc().splitlines(keepends=True)).rstrip())
        return 1
    return 0


def tell(text: str) -> None:
    """Standard error takes it in one piece, so that what several processes tell is not mixed."""
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
