"""Exceptions whose text is all that a command line prints of them, no traceback.

UserError means "a person can fix this" (exit code 2), RendezvousError "try again" (1).
"""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Wrong input: the text names the file or key, what was found, what was expected and what to do.

    `on_all_ranks` says that every process of a launch raises the same, so that one of them may speak for all.
    """

    def __init__(self, text: str, on_all_ranks: bool = False):
        super().__init__(text)
        self.on_all_ranks = on_all_ranks


class RendezvousError(RuntimeError):
    """The processes of a launch did not meet; the text says who waited where. Another start may do better."""


def exit_code_of(action: Callable[[], object]) -> int:
    """0 after `action()`, or 2 with the text of its UserError on standard error: the end of a script's `main`."""
    try:
        action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
