"""One way to open whatever holds trained weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from npp_ds.config import ModelSection, RunConfig
from npp_ds.config_checks import load_config
from npp_ds.errors import UserError
from npp_ds.files import sha256
from npp_ds.weights.checkpoint import RECORD, checkpoint_of, read_weights
from npp_ds.weights.state_files import MASTER

KINDS = {"raw": MASTER, "ema": "ema"}  # what people call them, and what a checkpoint does


@dataclass(frozen=True)
class Weights:
    """Trained weights that have been found but not read yet.

    `name` and `step` are for people (None: not known); `kind` is "raw", or "ema" for the moving average; `sha256`
    tells these weights from all others; `read()` gives {name: float32 tensor} on the CPU; `config` is that of the run,
    for weights in a run folder; `patch_side` that of the stage in which they were last trained (None: not known).
    """

    path: Path
    name: str
    step: int | None
    kind: str
    model: ModelSection
    sha256: str
    read: Callable[[], dict[str, Tensor]]
    config: RunConfig | None = None
    patch_side: int | None = None


def open_weights(path: str | Path, *, step: int | None = None, kind: str = "raw") -> Weights:
    """The weights of a run folder: of its newest complete checkpoint, or of that of `step`.

    Raises UserError when there are none, or none of that step or kind.
    """
    if kind not in KINDS:
        raise UserError(f"weights: found {kind!r}, expected one of {', '.join(KINDS)}")
    path = Path(path)
    config_file = path / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{config_file}: not found; expected the folder of a run, as `npp train` makes it")
    config = load_config(file=config_file)
    folder, record = checkpoint_of(path, step, KINDS[kind])

    def read() -> dict[str, Tensor]:
        return read_weights(folder, record, KINDS[kind])

    side = config.stage_table()[record.stage].patch_side
    return Weights(path, config.name, record.step, kind, config.model, sha256(folder / RECORD), read, config, side)
