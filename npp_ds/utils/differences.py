"""What differs between the settings that a folder was made with and those asked for, in words."""

from collections.abc import Iterator
from typing import Any


def differences(found: dict, wanted: dict, prefix: str = "") -> Iterator[str]:
    """A text for each setting that was `found` with another value than the `wanted` one.

    Names that are missing in `found`, which an earlier version did not write down, count as equal.
    """
    for name in sorted(found):
        left, right = found[name], wanted.get(name)
        if _are_sections(left) and _are_sections(right) and len(left) == len(right):
            left, right = (dict(zip(map(str, range(len(v))), v, strict=True)) for v in (left, right))
        if isinstance(left, dict) and isinstance(right, dict):
            yield from differences(left, right, f"{prefix}{name}.")
        elif left != right and isinstance(left, list) and isinstance(right, list):
            yield f"{prefix}{name}: it has {_shortened(left, right)}, asked for {_shortened(right, left)}"
        elif left != right:
            yield f"{prefix}{name}: it has {left!r}, asked for {right!r}"


def _are_sections(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _shortened(values: list, others: list, shown: int = 3) -> str:
    """The count of a long list and its values from the first one that differs."""
    if len(values) <= shown and len(others) <= shown:
        return repr(values)
    first = next((i for i, pair in enumerate(zip(values, others, strict=False)) if pair[0] != pair[1]), len(others))
    return f"{len(values)} entries, number {first} on: {values[first : first + shown]!r}"
