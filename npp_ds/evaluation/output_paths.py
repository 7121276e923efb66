"""Where results go: tried before the hours of measuring, and errors there in words."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from npp_ds.errors import UserError


@contextmanager
def writing(path: str | Path, advice: str = "make room or name another place") -> Iterator[None]:
    """Inside, an OSError becomes a UserError that names its file, else `path`, and ends with `advice`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}; {advice}") from error


def try_target(path: str | Path) -> Path:
    """Makes the folder of a result, and sees that files can be made there; returns `path`. UserError when not."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected the name of a file")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    return path
