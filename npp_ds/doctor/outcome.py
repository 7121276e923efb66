"""What a check found on one process, and how the findings of all processes become one row of the table."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

from npp_ds.errors import UserError

OK, WARNING, FAILURE, NOT_RUN = "ok", "warning", "failure", "not run"
_SEVERITY = (OK, WARNING, FAILURE)
_SHOWN = 4  # names or groups in one row

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Outcome:
    """`detail` says what was found and, where it is not `OK`, what to do.

    `alike` is what all processes must agree on. Where `margin` is given, the process with the least speaks for all
    that are as well. `lasting`: another start would find the same, so a person must mend it first.
    """

    detail: str
    state: str = OK
    lasting: bool = False
    alike: str | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Check(Generic[Subject]):
    """`examine` returns None where there is nothing to look at; `differing` is the state when `alike` is not alike.

    `lasting`: what it finds wrong is so of settings or data, not of a machine or of what happened on it.
    """

    name: str
    examine: Callable[[Subject], Outcome | None]
    differing: str = FAILURE
    lasting: bool = False

    def outcome(self, subject: Subject) -> Outcome | None:
        """What `examine` returns; whatever it raises is a failure, so that no process waits for one that has gone.

        Only a UserError can be lasting: another exception (a lost connection, say) may have been the last of its kind.
        """
        try:
            found = self.examine(subject)
        except UserError as error:
            return Outcome(str(error), FAILURE, self.lasting or error.on_all_ranks)
        except OSError as error:
            return Outcome(f"{error.filename}: {error.strerror}", FAILURE)
        except Exception as error:
            return Outcome(f"{type(error).__name__}: {error}", FAILURE)
        return replace(found, lasting=True) if self.lasting and found and found.state == FAILURE else found


class Answer(NamedTuple):
    """The outcome of one process."""

    rank: int
    node: str
    outcome: Outcome


@dataclass(frozen=True)
class Row:
    """One check over all processes; `reason` is what the process `rank` on `node`, the first of its kind, found."""

    name: str
    state: str
    detail: str
    reason: str = ""
    node: str = ""
    rank: int = 0
    lasting: bool = False


def merged(check: Check, answers: Sequence[Answer]) -> Row | None:
    """The worst state decides, and of failures a lasting one speaks; hosts are named where processes differ.

    None when no process had anything to say.
    """
    if not answers:
        return None
    worst = max((a.outcome.state for a in answers), key=_SEVERITY.index)
    if worst == OK and len({a.outcome.alike for a in answers}) > 1:
        return _row_of_unlike(check, answers)
    of_worst = sorted((a for a in answers if a.outcome.state == worst), key=lambda a: not a.outcome.lasting)
    speaker, detail = of_worst[0], _said_by_all(of_worst)
    if worst == OK and len(of_worst) > 1 and all(a.outcome.margin is not None for a in of_worst):
        speaker = min(of_worst, key=lambda a: a.outcome.margin)
        detail = _one_line(speaker.outcome.detail)
        if len({a.node for a in of_worst}) > 1 and len({a.outcome.detail for a in of_worst}) > 1:
            detail += f" (the worst, on {speaker.node})"
    elif worst == OK and len({a.outcome.detail for a in of_worst}) == 1:
        detail = _one_line(speaker.outcome.detail)
    lasting = any(a.outcome.lasting for a in of_worst)
    return Row(check.name, worst, detail, _one_line(speaker.outcome.detail), speaker.node, speaker.rank, lasting)


def _row_of_unlike(check: Check, answers: Sequence[Answer]) -> Row:
    """The process that stands out is one of the fewest; of two halves, not the first one."""
    counts = Counter(a.outcome.alike for a in answers)
    usual = counts.most_common(1)[0][0]
    odd = next(a for a in answers if a.outcome.alike != usual)
    reason = f"{odd.outcome.alike}, elsewhere {usual}; make it alike on all nodes"
    groups: dict[str, list[str]] = {}
    for answer in answers:
        groups.setdefault(str(answer.outcome.alike), []).append(answer.node)
    detail = f"not alike: {_listed([f'{_nodes(nodes)}: {value}' for value, nodes in groups.items()])}"
    return Row(check.name, check.differing, _one_line(detail), _one_line(reason), odd.node, odd.rank, check.lasting)


def _said_by_all(answers: Sequence[Answer]) -> str:
    groups: dict[str, list[str]] = {}
    for answer in answers:
        groups.setdefault(_one_line(answer.outcome.detail), []).append(answer.node)
    return _listed([f"{_nodes(nodes)}: {detail}" for detail, nodes in groups.items()])


def _nodes(names: Sequence[str]) -> str:
    return _listed(list(dict.fromkeys(names)), ", ")


def _listed(parts: Sequence[str], separator: str = "; ") -> str:
    more = len(parts) - _SHOWN
    return separator.join(parts[:_SHOWN]) + (f"{separator}and {more} more" if more > 0 else "")


def _one_line(text: str) -> str:
    return " ".join(text.split())
