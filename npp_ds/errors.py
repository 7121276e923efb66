"""The one exception that means "a person can fix this": command lines print its text, no traceback, and exit with 2."""


class UserError(ValueError):
    """Wrong input: the text names the file or key, what was found, what was expected and what to do.

    `on_all_ranks` says that every process of a launch raises the same, so that one of them may speak for all.
    """

    def __init__(self, text: str, on_all_ranks: bool = False):
        super().__init__(text)
        self.on_all_ranks = on_all_ranks
