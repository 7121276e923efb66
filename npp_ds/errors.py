"""Exceptions whose text is all that a command line prints of them, no traceback, and parts of such texts.

UserError means "a person can fix this" (exit code 2), RendezvousError "try again" (1).
"""

import errno
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

_OF_THE_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EFBIG),
    *(errno.EMFILE, errno.ENFILE, errno.EADDRINUSE, errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EHOSTUNREACH),
}  # what an OSError that names no file may stand for; any other one is a programming error
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
)  # in messages of torch's RuntimeError
_CONNECTION_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")


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


def as_user_error(error: BaseException) -> UserError | RendezvousError | None:
    """Return what an exception of the system or of a library means for a user; None for a programming error.

    Torch is not imported for it, so its exceptions are recognised by the names of their classes.
    """
    if isinstance(error, UserError | RendezvousError):
        return error
    if is_out_of_memory(error):
        return UserError(f"out of memory: {_first_sentences(error)}; use a smaller batch or model, or more memory")
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _OF_THE_MACHINE):
        where = f"{error.filename}: " if error.filename is not None else ""
        return UserError(f"{where}{error.strerror or error}; fix that, or name another path")
    lost = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    if lost or (isinstance(error, RuntimeError) and any(part in str(error) for part in _CONNECTION_LOST)):
        return RendezvousError(
            f"lost the connection to another process of this launch ({_first_sentences(error)}): it has ended or "
            "cannot be reached; its own messages say why"
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that the memory of the process or of its GPU is used up."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or (isinstance(error, RuntimeError | OSError) and any(part in str(error) for part in _OUT_OF_MEMORY))


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turn used-up memory in the block into a UserError that ends with `advice`, such as "lower --batch-size"."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {_first_sentences(error)}; {advice}") from error


@contextmanager
def content_of(path: object, expected: str) -> Iterator[None]:
    """Turn what wrong content of files under `path` raises in the block into a UserError that names the line of code.

    For commands that show files of many kinds, whose content may be anybody's, and change nothing.
    """
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(at.filename).name}:{at.lineno}"
        reason = f"{type(error).__name__}: {_first_sentences(error)}, {where}"
        raise UserError(f"{path}: its files do not hold {expected} ({reason}); restore them") from error


def _first_sentences(error: BaseException) -> str:
    """Return the beginning of a library's message, in one line."""
    return " ".join(str(error).split())[:200].rstrip(". ") or type(error).__name__
