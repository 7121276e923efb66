"""Exceptions whose text is all that a command line prints of them, no traceback, and parts of such texts.

UserError means "a person can fix this" (exit code 2), RendezvousError "try again" (1).
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class UserError(ValueError):
    """Wrong input: the text names the file or key, what was found, what was expected and what to do.

    `on_all_ranks` says that every process of a launch raises the same, so that one of them may speak for all.
    """

    def __init__(self, text: str, on_all_ranks: bool = False):
        super().__init__(text)
        self.on_all_ranks = on_all_ranks


class RendezvousError(RuntimeError):
    """The processes of a launch did not meet; the text says who waited where. Another start may do better."""


def similar_names(typed: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Return the known names that somebody who typed another one may have meant, none if nothing is like it.

    The first of these rules that any name satisfies decides: equal but for case, begins with what was typed, contains
    it, has it as its initials (`lr`: `learning_rate`), looks like it.
    """
    word, names = typed.casefold(), {name.casefold(): name for name in known}
    initials = {name: "".join(part[0] for part in re.split(r"[\W_]+", name) if part) for name in names}
    found = (
        [name for name in names if name == word]
        or [name for name in names if word and name.startswith(word)]
        or [name for name in names if len(word) > 2 and word in name]
        or [name for name in names if len(word) > 1 and initials[name] == word]
        or get_close_matches(word, names, n=most)
    )
    return [names[name] for name in found[:most]]


def did_you_mean(names: Sequence[str]) -> str:
    """Return a text to append to what was found: `, did you mean a, b or c?`, or nothing without names."""
    *others, last = names or [""]
    return f", did you mean {' or '.join(filter(None, [', '.join(others), last]))}?" if last else ""
