"""A folder of samples: the images for metrics, a picture for eyes, and a record of how they were made."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npp_ds.errors import UserError
from npp_ds.files import write_atomic, write_json_atomic
from npp_ds.sampling.grid import sample_grid

SAMPLES_FILE, RECORD_FILE, GRID_FILE = "samples.npz", "samples.json", "grid.png"


def write_samples(
    directory: str | Path,
    images: np.ndarray,
    labels: np.ndarray,
    record: dict[str, Any],
    class_names: Sequence[str] = (),
) -> None:
    """Writes samples.npz (`arr_0` uint8 [N, H, W, 3], what ADM's evaluator reads, then `labels`), grid.png,
    samples.json.

    Each file appears whole or not at all; samples.json comes last and says that the rest is there.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECORD_FILE).unlink(missing_ok=True)
    write_atomic(directory / SAMPLES_FILE, lambda file: np.savez(file, arr_0=images, labels=labels))
    write_atomic(directory / GRID_FILE, lambda file: sample_grid(images, labels, class_names).save(file, "PNG"))
    write_json_atomic(directory / RECORD_FILE, record)


def load_samples(directory: str | Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(images, labels, record) as `write_samples` wrote them; UserError when the folder holds no finished samples."""
    directory = Path(directory)
    try:
        record = json.loads((directory / RECORD_FILE).read_text())
        with np.load(directory / SAMPLES_FILE) as file:
            return file["arr_0"], file["labels"], record
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{directory}: no finished samples ({error}); expected {SAMPLES_FILE} and {RECORD_FILE}, run `npp sample`"
        ) from None


def newest_samples(run_dir: str | Path) -> Path:
    """The folder under <run_dir>/samples that was finished last. Raises UserError when there is none."""
    records = Path(run_dir).glob(f"samples/*/{RECORD_FILE}")
    newest = max(records, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(f"{run_dir}: holds no samples; expected some under samples/, run `npp sample {run_dir}`")
    return newest.parent


def repeated_images(images: np.ndarray) -> int:
    """How many images are pixel for pixel equal to an earlier one."""
    return len(images) - len({image.tobytes() for image in images})
