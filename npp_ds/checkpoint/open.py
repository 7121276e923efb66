"""Open trained weights, whatever holds them: a run folder, an exported file or a published LlamaGen checkpoint.

`open_weights` reads what describes the weights. The tensors are read later, one by one.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

import npp_ds
from npp_ds.checkpoint.folders import RECORD, CheckpointRecord, complete_at_step, newest_complete, read_record
from npp_ds.checkpoint.llamagen import inspect_published, reading_published
from npp_ds.checkpoint.rank_files import MASTER, SavedState
from npp_ds.checkpoint.safetensors_io import Shape, as_weights, misfits, opened_safetensors, shapes_of_weights
from npp_ds.config.load import load_config
from npp_ds.config.schema import ModelSection, RunConfig
from npp_ds.data.manifest import Coding, Manifest, TokenizerId
from npp_ds.data.store import available_manifest
from npp_ds.errors import UserError
from npp_ds.model import ModelConfig, Transformer
from npp_ds.utils.files import parse_json, plain_name, read_json, sha256
from npp_ds.utils.hub import CONFIG_FILE, WEIGHTS_FILE

STATES = {"raw": MASTER, "ema": "ema"}  # the state of a checkpoint that holds each variant of the weights
EXPORTED_SUFFIX = ".safetensors"
METADATA_KEY = "npp_weights"  # a single entry, because safetensors writes several in no fixed order
METADATA_FORMAT = 1

Reader = Callable[[str], Tensor]  # parameter name -> the whole tensor, on the CPU


@dataclass(frozen=True)
class Weights:
    """Trained weights that have been found but not read. Instances can be sent to other processes.

    `variant` is "raw", or "ema" for the moving average. `shapes` holds the shape of each parameter. `name` and `step`
    are for people; `step` is None if unknown. `fingerprinted` is the file whose SHA-256 identifies these weights.
    `model` has attention "auto", whatever the run used: the kernel depends on the machine. `patch_side` is that of the
    stage that they were last trained in, None if unknown. Weights of a run folder have its `config`.
    `config_hash` and `tokenizer` are None, and `class_names` is empty, if unknown. `grid_is_guessed` is true if neither
    the file nor the caller gave the grid size. `has_null_class` is false for a model that was trained without class
    dropout: the last row of its class embedding means nothing, so it cannot be guided.
    """

    path: Path
    name: str
    step: int | None
    variant: str
    model: ModelSection
    shapes: dict[str, Shape]
    fingerprinted: Path
    open_reader: Callable[[], AbstractContextManager[Reader]]
    config: RunConfig | None = None
    patch_side: int | None = None
    config_hash: str | None = None
    tokenizer: TokenizerId | None = None
    class_names: tuple[str, ...] = ()
    grid_is_guessed: bool = False
    has_null_class: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", _with_any_kernel(self.model))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of `fingerprinted`, which is read whole, once."""
        return sha256(self.fingerprinted)

    @property
    def coding(self) -> Coding:
        """What the codes and labels of the model stand for, to compare with shards."""
        model = self.model
        sizes = (model.grid_size, model.vocab_size, model.num_classes)
        return Coding(*sizes, self.tokenizer, self.class_names)

    def describe(self) -> str:
        """Return one line for people: name, step, variant and the shape of the model."""
        shape, model = self.model.shape(), self.model
        step = "" if self.step is None else f", step {self.step}"
        grouped = f", {model.n_kv_heads} of keys and values" if model.n_kv_heads else ""
        return (
            f"{self.name}{step}, {self.variant} weights: {model.parameters() / 1e6:.1f}M parameters, "
            f"{shape['n_layers']} layers of {shape['n_heads']} heads{grouped}, dim {shape['dim']}, "
            f"{model.vocab_size} codes, grid {model.grid_size}x{model.grid_size}, {model.num_classes} classes"
            f"{'' if self.has_null_class else ' and no null class'}"
        )

    def guess_warning(self) -> str | None:
        """Return a warning if the grid size is a guess: a wrong one samples and trains without any error."""
        if not self.grid_is_guessed:
            return None
        grid = self.model.grid_size
        return f"{self.path} does not contain its grid size; assuming {grid}x{grid}, set --grid-size if that is wrong"

    def metadata(self) -> dict[str, Any]:
        """Return the JSON that an exported file holds under METADATA_KEY.

        It contains no path and no time, so that equal weights make equal files.
        """
        return {
            "format": METADATA_FORMAT,
            "name": self.name,
            "step": self.step,
            "kind": self.variant,
            "model": self.model.model_dump(mode="json"),
            "tokenizer": self.tokenizer._asdict() if self.tokenizer else None,
            "class_names": list(self.class_names),
            "config_hash": self.config_hash,
            "source": {"sha256": self.sha256},
            "npp_ds": npp_ds.__version__,
            **({} if self.has_null_class else {"null_class": False}),
            **({"patch_side": self.patch_side} if (self.patch_side or 1) > 1 else {}),
        }

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """Yield a function: parameter name -> its float32 tensor on the CPU.

        Each call of the function reads one tensor. It raises UserError if that one holds NaN or infinity.
        """
        with self.open_reader() as tensor:
            yield lambda name: as_weights(self.path, name, tensor(name))

    def read(self) -> dict[str, Tensor]:
        """Read all tensors: {parameter name: float32 tensor on the CPU}."""
        with self.reading() as tensor:
            return {name: tensor(name) for name in self.shapes}


def open_weights(
    path: str | Path,
    *,
    step: int | None = None,
    variant: str = "raw",
    n_heads: int | None = None,
    grid_size: int | None = None,
    verify: bool = False,
) -> Weights:
    """Open the weights of a run folder, of a file or folder that `npp export` or `npp import` wrote, or as published.

    A run folder gives those of its newest complete checkpoint, or of the checkpoint of `step`. `variant` is "raw", or
    "ema" for the moving average. An exported file holds a single variant; "raw" accepts either. `n_heads` and
    `grid_size` supply what published checkpoints leave out. By default the record of a checkpoint and the sizes of its
    files are trusted; `verify` also compares their SHA-256, which reads them whole, moments included.

    Raises UserError if there are no such weights.
    """
    path = Path(path)
    if variant not in STATES:
        raise UserError(f"weights: found {variant!r}, expected one of {', '.join(STATES)}")
    if (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file():
        path = path / WEIGHTS_FILE
    if path.is_dir():
        weights = _open_run(path, step, variant, verify)
    elif not path.is_file():
        raise UserError(
            f"{path}: not found; expected the folder of a run, as `npp train` makes it, a .safetensors file of "
            "`npp export` or `npp import`, or a published checkpoint"
        )
    elif step is not None:
        raise UserError(f"{path}: step {step} requested, but a file holds a single step; omit the step")
    elif path.suffix == EXPORTED_SUFFIX:
        weights = _open_exported(path)
    else:
        weights = _open_published(path, variant, n_heads, grid_size)
    _check_requested(weights, variant, n_heads, grid_size)
    return weights


def _check_requested(weights: Weights, variant: str, n_heads: int | None, grid_size: int | None) -> None:
    if variant == "ema" and weights.variant != "ema":
        raise UserError(f"{weights.path}: holds raw weights, no ema; export the average, or use the raw weights")
    found = {"number of heads": weights.model.shape()["n_heads"], "grid size": weights.model.grid_size}
    for (name, value), requested in zip(found.items(), (n_heads, grid_size), strict=True):
        if requested not in (None, value):
            raise UserError(f"{weights.path}: its {name} is {value}, but {requested} was requested; request {value}")


def _open_run(path: Path, step: int | None, variant: str, verify: bool) -> Weights:
    config_file = path / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{config_file}: not found; expected the folder of a run, as `npp train` makes it")
    config = load_config(file=config_file)
    folder, record = _select_checkpoint(path / "checkpoints", step, variant, verify)
    manifest, stages = _manifest_of(config, record), config.stage_table()
    if record.stage >= len(stages):
        raise UserError(
            f"{folder / RECORD}: stage {record.stage} of {len(stages)} in {config_file}; restore these files"
        )
    shapes = {name: tuple(shape) for name, shape in record.shapes.items()}
    return Weights(
        path=path,
        name=config.name,
        step=record.step,
        variant=variant,
        model=config.model,
        shapes=_check_shapes(folder, shapes, config.model),
        fingerprinted=folder / RECORD,
        open_reader=partial(_reading_checkpoint, folder, list(record.files), shapes, STATES[variant]),
        config=config,
        patch_side=stages[record.stage].patch_side,
        config_hash=record.config_hash,
        tokenizer=TokenizerId(manifest.tokenizer.name, manifest.tokenizer.sha256) if manifest else None,
        class_names=tuple(manifest.class_names) if manifest else (),
        has_null_class=config.data.class_dropout > 0 or config.init_from is not None,
    )


def _select_checkpoint(
    checkpoints: Path, step: int | None, variant: str, verify: bool
) -> tuple[Path, CheckpointRecord]:
    """Return the folder and record of the newest complete checkpoint, or of that of `step`. Raises UserError."""
    folder = newest_complete(checkpoints, verify) if step is None else complete_at_step(checkpoints, step, verify)
    if folder is None:
        raise UserError(f"{checkpoints}: no complete checkpoint; train the run first, or name another run folder")
    record = read_record(folder)
    if STATES[variant] not in record.kinds:
        raise UserError(
            f"{folder}: holds no {variant} weights; set optimizer.ema_decay when training, or use the raw weights"
        )
    return folder, record


@contextmanager
def _reading_checkpoint(folder: Path, files: list[str], shapes: dict[str, Shape], state: str) -> Iterator[Reader]:
    with SavedState(folder, files, shapes) as saved:
        yield partial(saved.whole, state)


def _manifest_of(config: RunConfig, record: CheckpointRecord) -> Manifest | None:
    """Return the manifest of the shards that the checkpoint was trained on, None if it is not available."""
    manifest = available_manifest(config.data.train, config.data.cache_dir)
    return manifest if manifest and manifest.fingerprint() == record.data_fingerprint else None


def _open_exported(path: Path) -> Weights:
    with opened_safetensors(path) as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
        if text is None and path.name == WEIGHTS_FILE and (path.parent / CONFIG_FILE).is_file():
            text = _described_by_config(path.parent)
        if text is None:
            raise UserError(f"{path}: not written by npp_ds; expected a file made by npp export or npp import")
        found = shapes_of_weights(path, file)
    described = _parse_metadata(path, text)
    return Weights(
        path=path,
        shapes=_check_shapes(path, found, described["model"]),
        fingerprinted=path,
        open_reader=partial(_reading_exported, path),
        **described,
    )


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("found control characters, expected printable ones")
    return text


_Name = Annotated[str, AfterValidator(plain_name)]
_ClassName = Annotated[str, Field(max_length=1000), AfterValidator(_printable)]


class _Tokenizer(BaseModel):
    name: _Name
    sha256: str = Field(pattern="^([0-9a-f]{64})?$")  # "" if unknown, as of imported codes


class _Metadata(BaseModel):
    """The schema of what `Weights.metadata` writes, for files of anybody: its texts enter paths and messages."""

    model_config = ConfigDict(strict=True)

    format: Literal[1]
    name: _Name
    step: int | None = Field(ge=0, lt=2**63)
    kind: Literal["raw", "ema"]
    model: ModelSection
    tokenizer: _Tokenizer | None
    class_names: list[_ClassName]
    config_hash: str | None
    null_class: bool = True
    patch_side: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _each_class_has_a_name(self) -> "_Metadata":
        if len(self.class_names) not in (0, self.model.num_classes):
            raise ValueError(f"{len(self.class_names)} class_names for {self.model.num_classes} classes")
        return self


def _described_by_config(folder: Path) -> str:
    """Return metadata for a folder of `Transformer.save_pretrained`, which describes the shape of the model only."""
    unknown = dict.fromkeys(("step", "config_hash", "tokenizer"))
    try:
        model = read_json(folder / CONFIG_FILE)
    except ValueError as error:
        raise UserError(f"{folder / CONFIG_FILE}: not valid JSON ({error}); save the model again") from None
    about = {"format": METADATA_FORMAT, "name": folder.resolve().name, "kind": "raw", "class_names": []}
    return json.dumps({**about, **unknown, "model": model})


def _parse_metadata(path: Path, text: str) -> dict[str, Any]:
    """Return the fields of `Weights` that `Weights.metadata` wrote. Raises UserError for anything else."""
    try:
        values = parse_json(text)
        if (found := values["format"]) != METADATA_FORMAT:
            raise UserError(
                f"{path}: format {found!r}, this version reads {METADATA_FORMAT}; use the npp_ds that wrote it"
            )
        read = _Metadata.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, e['loc'])) or 'all'}: {e['msg']}, found {e['input']!r:.80}" for e in error.errors()[:3]
        ]
        raise UserError(f"{path}: its entry {METADATA_KEY} is wrong: {'; '.join(problems)}; export it again") from None
    except UserError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: its entry {METADATA_KEY} is not readable ({error!r}); export it again") from error
    return {
        "name": read.name,
        "step": read.step,
        "variant": read.kind,
        "config_hash": read.config_hash,
        "model": read.model,
        "tokenizer": TokenizerId(read.tokenizer.name, read.tokenizer.sha256) if read.tokenizer else None,
        "class_names": tuple(read.class_names),
        "has_null_class": read.null_class,
        "patch_side": read.patch_side,
    }


@contextmanager
def _reading_exported(path: Path) -> Iterator[Reader]:
    with opened_safetensors(path) as file:
        yield file.get_tensor


def _open_published(path: Path, variant: str, n_heads: int | None, grid_size: int | None) -> Weights:
    found = inspect_published(path, variant, n_heads, grid_size)
    return Weights(
        path=path,
        name="".join(c if c.isprintable() else "_" for c in path.stem),
        step=found.step,
        variant=variant,
        model=found.model,
        shapes=_check_shapes(path, found.shapes, found.model),
        fingerprinted=path,
        open_reader=partial(reading_published, path, variant, found.model.num_classes),
        grid_is_guessed=found.grid_is_guessed,
        has_null_class=found.has_null_class,
    )


def _with_any_kernel(model: ModelSection) -> ModelSection:
    return model.model_copy(update={"attention": "auto"})


def _check_shapes(path: Path, found: dict[str, Shape], model: ModelSection) -> dict[str, Shape]:
    """Return the parameter shapes of a model, in its order. Raises UserError if the tensors of the file differ."""
    try:
        with torch.device("meta"):
            state = Transformer(ModelConfig(**_with_any_kernel(model).arguments())).state_dict()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path}: no model can have its shape ({error})") from error
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if problems := misfits(found, expected):
        raise UserError(f"{path}: not the weights of a class-conditional LlamaGen model: {problems}")
    return expected
