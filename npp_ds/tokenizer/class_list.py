"""Class names from a file, checked against the class folders: another order would give every image a wrong label."""

import re
from collections.abc import Sequence
from pathlib import Path

from npp_ds.errors import UserError

WORDNET_ID = re.compile(r"n\d{8}")


def read_class_list(path: str | Path, folders: Sequence[str] = ()) -> list[str]:
    """Class names in label order from a file with one class a line: `name`, `id` or `id name`.

    `folders` are the sorted class folders of the images, or none where labels come with the images. A list that has
    ids (WordNet ids, or names of class folders) must have the folders' ids in their order; one without ids must have
    as many lines as there are folders. UserError with the difference otherwise.
    """
    lines = _lines(path)
    ids = _ids(lines, set(folders))
    if ids is None:
        if folders and len(lines) != len(folders):
            raise UserError(f"{path}: {len(lines)} class names for {len(folders)} class folders")
        return lines
    _check_ids(path, ids, folders)
    return [line.removeprefix(label).strip() or label for label, line in zip(ids, lines, strict=True)]


def _lines(path: str | Path) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no list of class names ({error})") from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{path}: empty; expected one class name a line, in the order of the labels")
    return lines


def _ids(lines: list[str], folders: set[str]) -> list[str] | None:
    """The id of every line, or None for a list of names alone."""
    if not folders.isdisjoint(lines):
        return lines
    first = [line.split(maxsplit=1)[0] for line in lines]
    return first if any(WORDNET_ID.fullmatch(word) or word in folders for word in first) else None


def _check_ids(path: str | Path, ids: list[str], folders: Sequence[str]) -> None:
    if twice := sorted({label for label in ids if ids.count(label) > 1}):
        raise UserError(f"{path}: lists {_some(twice)} twice")
    expected = list(folders) or sorted(ids)
    problems = []
    if extra := [label for label in ids if label not in set(expected)]:
        problems.append(f"lists {_some(extra)}, for which there is no class folder")
    if missing := [label for label in expected if label not in set(ids)]:
        problems.append(f"lacks {_some(missing)}, for which there is one")
    if not problems and ids != expected:
        line = next(i for i, pair in enumerate(zip(ids, expected, strict=True)) if pair[0] != pair[1])
        problems.append(f"line {line + 1} is {ids[line]}, expected {expected[line]}: class ids follow the sorted ids")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}; mend the list or the folders")


def _some(labels: list[str], shown: int = 3) -> str:
    return ", ".join(labels[:shown]) + (f" and {len(labels) - shown} more" if len(labels) > shown else "")
