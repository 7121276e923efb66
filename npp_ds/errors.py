"""Exceptions whose text is all that a command line prints of them, no traceback.

UserError means "a person can fix this" (exit code 2), RendezvousError "try again" (1).
"""


class UserError(ValueError):
    """Wrong input: the text names the file or key, what was found, what was expected and what to do.

    `on_all_ranks` says that every process of a launch raises the same, so that one of them may speak for all.
    """

    def __init__(self, text: str, on_all_ranks: bool = False):
        super().__init__(text)
        self.on_all_ranks = on_all_ranks


class RendezvousError(RuntimeError):
    """The processes of a launch did not meet; the text says who waited where. Another start may do better."""
