"""Weights in one file: ours (safetensors that say what they are) and the published layout (`.pt`).

Both are written one tensor at a time, so that memory stays far below the size of the weights.
"""

import json
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import torch
from torch import Tensor

import npp_ds
from npp_ds.checkpoint.safetensors_io import DTYPES, Entry, bytes_of, opened_safetensors, safetensors_blocks
from npp_ds.checkpoint.weights import Reader, TokenizerId, Weights, fitting_shapes
from npp_ds.config.schema import ModelSection
from npp_ds.errors import UserError
from npp_ds.utils.files import write_atomic

METADATA_KEY = "npp_weights"  # one entry, because safetensors writes several in no fixed order
FORMAT = 1
SUFFIXES = {"safetensors": ".safetensors", "published": ".pt"}


def export_weights(
    weights: Weights, out: str | Path, *, layout: str = "safetensors", dtype: str = "fp32", force: bool = False
) -> None:
    """Writes `weights` to the file `out`, which appears whole or not at all.

    Layout "safetensors" is ours, "published" what the published sampling scripts load: {"model": {name: tensor}}.
    Raises UserError for a file that exists (unless `force`), another suffix than the layout's, and values that `dtype`
    cannot hold.
    """
    out = Path(out)
    for name, value, known in (("--format", layout, SUFFIXES), ("--dtype", dtype, DTYPES)):
        if value not in known:
            raise UserError(f"{name}: found {value!r}, expected one of {', '.join(known)}")
    if out.suffix != SUFFIXES[layout]:
        raise UserError(f"{out}: the suffix of a file in {layout} format is {SUFFIXES[layout]}; name it so")
    if out.exists() and not force:
        raise UserError(f"{out}: exists already; give --force to replace it, or another name")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder; make it first")
    write = {"safetensors": _write_safetensors, "published": _write_published}[layout]
    try:
        write_atomic(out, partial(write, weights, DTYPES[dtype]))
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; make room or name another place") from error


def _converted(tensor: Reader, dtype: torch.dtype, name: str) -> Tensor:
    values = tensor(name).to(dtype)
    if dtype == torch.float16 and not values.isfinite().all():
        raise UserError(f"{name}: has values that fp16 cannot hold; use --dtype bf16 or fp32")
    return values


def _write_safetensors(weights: Weights, dtype: torch.dtype, file: BinaryIO) -> None:
    metadata = {METADATA_KEY: json.dumps(_description(weights))}
    with weights.reading() as tensor:
        values = partial(_converted, tensor, dtype)
        entries = [Entry(name, dtype, shape, partial(values, name)) for name, shape in weights.shapes.items()]
        for block in safetensors_blocks(metadata, entries):
            file.write(block)


def _write_published(weights: Weights, dtype: torch.dtype, file: BinaryIO) -> None:
    """`torch.save` wants all tensors at once: they wait in a nameless file beside the result, mapped."""
    with TemporaryFile(dir=Path(file.name).parent) as waiting:
        offsets = _write_plainly(weights, dtype, waiting)
        mapped = mmap.mmap(waiting.fileno(), 0, access=mmap.ACCESS_COPY)
        tensors = {
            name: torch.frombuffer(mapped, dtype=dtype, offset=offsets[name], count=prod(shape)).view(shape)
            for name, shape in weights.shapes.items()
        }
        torch.save({"model": tensors}, file)


def _write_plainly(weights: Weights, dtype: torch.dtype, file: BinaryIO) -> dict[str, int]:
    """Writes nothing but the tensors' bytes; returns where each begins. The source is closed again afterwards."""
    offsets = {}
    with weights.reading() as tensor:
        for name in weights.shapes:
            offsets[name] = file.tell()
            for block in bytes_of(_converted(tensor, dtype, name)):
                file.write(block)
    file.flush()
    return offsets


def _description(weights: Weights) -> dict[str, Any]:
    """What an exported file says of itself: nothing of where its source lay, or when it was made."""
    return {
        "format": FORMAT,
        "name": weights.name,
        "step": weights.step,
        "kind": weights.kind,
        "model": weights.model.model_dump(mode="json"),
        "tokenizer": weights.tokenizer._asdict() if weights.tokenizer else None,
        "class_names": list(weights.class_names),
        "config_hash": weights.config_hash,
        "source": {"sha256": weights.sha256},
        "npp_ds": npp_ds.__version__,
    }


def open_exported(path: Path) -> Weights:
    """Weights that `export_weights` wrote as safetensors. Raises UserError for any other file, and damaged ones."""
    with opened_safetensors(path) as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if text is None:
        raise UserError(f"{path}: no weights of this software; expected a file made by npp export or npp import")
    described = _read_description(path, text)
    return Weights(
        path=path,
        shapes=fitting_shapes(path, found, described["model"]),
        fingerprinted=path,
        open_reader=partial(_reading, path),
        **described,
    )


def _read_description(path: Path, text: str) -> dict[str, Any]:
    """The fields of `Weights` that `_description` wrote down."""
    try:
        values = json.loads(text)
        found = values["format"]
        names = ("name", "step", "kind", "config_hash")
        described = found == FORMAT and {
            **{name: values[name] for name in names},
            "model": ModelSection.model_validate(values["model"]),
            "tokenizer": TokenizerId(**values["tokenizer"]) if values["tokenizer"] else None,
            "class_names": tuple(values["class_names"]),
        }
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: its entry {METADATA_KEY} is not readable ({error!r}); export it again") from error
    if not described:
        raise UserError(f"{path}: format {found}, this version reads {FORMAT}; use the npp_ds that wrote it")
    return described


@contextmanager
def _reading(path: Path) -> Iterator[Reader]:
    with opened_safetensors(path) as file:
        yield lambda name: file.get_tensor(name).float()
