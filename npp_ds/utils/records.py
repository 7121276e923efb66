"""What results record about their origin: the source commit, and how settings differ from those of an earlier start."""

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from npp_ds.errors import UserError
from npp_ds.utils.files import read_json


def git_commit() -> str | None:
    """Return the commit of this source tree, with "+" if files differ from it; None outside of a git work tree."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
        return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a text for each setting that was `found` with another value than the `wanted` one.

    Names that are missing in `found`, because an earlier version did not record them, count as equal.
    """
    for name in sorted(found):
        left, right = found[name], wanted.get(name)
        if _are_sections(left) and _are_sections(right) and len(left) == len(right):
            left, right = (dict(zip(map(str, range(len(v))), v, strict=True)) for v in (left, right))
        if isinstance(left, dict) and isinstance(right, dict):
            yield from differences(left, right, f"{prefix}{name}.")
        elif left != right and isinstance(left, list) and isinstance(right, list):
            yield f"{prefix}{name}: found {_shortened(left, right)}, requested {_shortened(right, left)}"
        elif left != right:
            yield f"{prefix}{name}: found {left!r}, requested {right!r}"


def check_same_settings(out: Path, files: Sequence[Path], wanted: dict[str, Any], what: str) -> dict[str, Any]:
    """Return the first of the JSON `files` in `out`, the settings of an earlier start that made `what`; {} without one.

    Raises UserError if they differ from the `wanted` ones, or are damaged. What is not `wanted` is not compared.
    """
    for file in files:
        try:
            if not isinstance(found := read_json(file), dict):
                raise ValueError(f"found {str(found)[:40]!r}, expected settings")
        except FileNotFoundError:
            continue
        except NotADirectoryError:
            raise UserError(f"{out}: found a file, expected a folder; name another one with --out") from None
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; fix that, or name another folder with --out") from None
        except ValueError as error:
            raise UserError(f"{file}: damaged ({error}); remove {out} and rerun the same command") from None
        if different := list(differences(_wanted_of(found, wanted), wanted)):
            raise UserError(
                f"{out}: holds {what} made with other settings ({'; '.join(different)}); choose another folder with "
                "--out, or remove that one"
            )
        return found
    return {}


def _wanted_of(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    both = ((name, found[name], value) for name, value in wanted.items() if name in found)
    return {name: _wanted_of(a, b) if isinstance(a, dict) and isinstance(b, dict) else a for name, a, b in both}


def _are_sections(value: Any) -> TypeGuard[list[dict]]:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _shortened(values: list, others: list, shown: int = 3) -> str:
    """Return the length of a long list and its values from the first one that differs."""
    if len(values) <= shown and len(others) <= shown:
        return repr(values)
    first = next((i for i, pair in enumerate(zip(values, others, strict=False)) if pair[0] != pair[1]), len(others))
    return f"{len(values)} entries, number {first} on: {values[first : first + shown]!r}"
