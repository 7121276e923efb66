"""One way to open whatever holds trained weights."""

from functools import partial
from pathlib import Path

from npp_ds.checkpoint.export import SUFFIXES, open_exported
from npp_ds.checkpoint.folders import RECORD, CheckpointRecord, checkpoint_of, reading_checkpoint
from npp_ds.checkpoint.llamagen import open_published
from npp_ds.checkpoint.rank_files import MASTER
from npp_ds.checkpoint.weights import TokenizerId, Weights
from npp_ds.config.load import load_config
from npp_ds.config.schema import RunConfig
from npp_ds.data.shards import Manifest
from npp_ds.data.store import available_manifest
from npp_ds.errors import UserError

KINDS = {"raw": MASTER, "ema": "ema"}  # what people call them, and what a checkpoint does


def open_weights(
    path: str | Path,
    *,
    step: int | None = None,
    kind: str = "raw",
    n_heads: int | None = None,
    grid_size: int | None = None,
    verify: bool = False,
) -> Weights:
    """The weights of a run folder, of a file that `npp export` or `npp import` wrote, or of a published checkpoint.

    A run folder has those of its newest complete checkpoint, or of that of `step`; `kind` is "raw", or "ema" for the
    moving average. An exported file has one kind only, which "raw" does not ask about. `n_heads` and `grid_size` say
    what published checkpoints leave out. A checkpoint's record, which holds its own hash, and the sizes of its files
    are believed unless `verify` asks for their SHA-256 too, which reads all of them whole, moments included. Raises
    UserError when there are no such weights.
    """
    path = Path(path)
    if kind not in KINDS:
        raise UserError(f"weights: found {kind!r}, expected one of {', '.join(KINDS)}")
    if path.is_dir():
        weights = _open_run(path, step, kind, verify)
    elif not path.is_file():
        raise UserError(
            f"{path}: not found; expected the folder of a run, as `npp train` makes it, a .safetensors file of "
            "`npp export` or `npp import`, or a published checkpoint"
        )
    elif step is not None:
        raise UserError(f"{path}: step {step} asked for, but a file holds one set of weights only; leave the step out")
    else:
        is_ours = path.suffix == SUFFIXES["safetensors"]
        weights = open_exported(path) if is_ours else open_published(path, kind, n_heads, grid_size)
    _check_what_was_asked(weights, kind, n_heads, grid_size)
    return weights


def _check_what_was_asked(weights: Weights, kind: str, n_heads: int | None, grid_size: int | None) -> None:
    if kind == "ema" and weights.kind != "ema":
        raise UserError(f"{weights.path}: holds raw weights, no ema; export the average, or use the plain weights")
    found = {"number of heads": weights.model.shape()["n_heads"], "grid size": weights.model.grid_size}
    for (name, value), asked in zip(found.items(), (n_heads, grid_size), strict=True):
        if asked not in (None, value):
            raise UserError(f"{weights.path}: its {name} is {value}, found {asked} asked for; ask for {value}")


def _open_run(path: Path, step: int | None, kind: str, verify: bool) -> Weights:
    config_file = path / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{config_file}: not found; expected the folder of a run, as `npp train` makes it")
    config = load_config(file=config_file)
    folder, record = checkpoint_of(path, step, KINDS[kind], verify)
    manifest = _manifest_of(config, record)
    return Weights(
        path=path,
        name=config.name,
        step=record.step,
        kind=kind,
        model=config.model,
        shapes={name: tuple(shape) for name, shape in record.shapes.items()},
        fingerprinted=folder / RECORD,
        open_reader=partial(reading_checkpoint, folder, record, KINDS[kind]),
        config=config,
        patch_side=config.stage_table()[record.stage].patch_side,
        config_hash=record.config_hash,
        tokenizer=TokenizerId(manifest.tokenizer.name, manifest.tokenizer.sha256) if manifest else None,
        class_names=tuple(manifest.class_names) if manifest else (),
    )


def _manifest_of(config: RunConfig, record: CheckpointRecord) -> Manifest | None:
    """The manifest of the shards that the checkpoint was trained on, where it is at hand."""
    manifest = available_manifest(config.data.train, config.data.cache_dir)
    return manifest if manifest and manifest.fingerprint() == record.data_fingerprint else None
