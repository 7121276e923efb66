"""Write weights to one file: our layout (safetensors that describe themselves) or the published one (`.pt`).

Both are written one tensor at a time, so memory stays far below the size of the weights. `export_hub` writes a folder
in our layout that Hugging Face's `from_pretrained` reads.
"""

import argparse
import json
import mmap
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import torch
from torch import Tensor

from npp_ds.checkpoint.llamagen import CLASS_EMBEDDING
from npp_ds.checkpoint.open import EXPORTED_SUFFIX, METADATA_KEY, Reader, Weights
from npp_ds.checkpoint.safetensors_io import DTYPES, Entry, Shape, bytes_of, safetensors_blocks
from npp_ds.errors import UserError
from npp_ds.model import ModelConfig
from npp_ds.utils.files import explain_os_errors, write_atomic, write_json_atomic
from npp_ds.utils.hub import CONFIG_FILE, WEIGHTS_FILE

TOKENIZER_FOLDER = "tokenizer"
SUFFIXES = {"safetensors": EXPORTED_SUFFIX, "published": ".pt"}


def export_weights(
    weights: Weights, out: str | Path, *, layout: str = "safetensors", dtype: str = "fp32", force: bool = False
) -> None:
    """Write `weights` to the file `out`, which appears complete or not at all.

    Layout "safetensors" is ours. "published" is what the published sampling scripts load: {"model": {name: tensor}}.
    Raises UserError for an existing file (unless `force`), for a suffix that does not belong to the layout, and for
    values that `dtype` cannot hold.
    """
    out = Path(out)
    if layout not in SUFFIXES:
        raise UserError(f"--format: found {layout!r}, expected one of {', '.join(SUFFIXES)} or hub")
    if out.suffix != SUFFIXES[layout]:
        raise UserError(f"{out}: the suffix of a file in {layout} format is {SUFFIXES[layout]}; rename it")
    _check_new(out, dtype, force)
    write = {"safetensors": _write_safetensors, "published": _write_published}[layout]
    with explain_os_errors(out):
        write_atomic(out, partial(write, weights, DTYPES[dtype]))


def export_hub(
    weights: Weights,
    out: str | Path,
    *,
    dtype: str = "fp32",
    force: bool = False,
    save_tokenizer: Callable[[Path], Any] | None = None,
    files: Mapping[str, bytes],
) -> None:
    """Write the folder `out` for the Hugging Face hub, which appears complete or not at all.

    It holds config.json and model.safetensors, which `Transformer.from_pretrained` and all commands read, the given
    `files`, and in `tokenizer/` what `save_tokenizer` writes into that folder. Raises UserError as `export_weights`.
    """
    out = Path(out)
    _check_new(out, dtype, force)
    if out.exists() and not (out / CONFIG_FILE).is_file():
        raise UserError(f"{out}: exists and has no {CONFIG_FILE}, so it is not replaced; give another name")
    with explain_os_errors(out), _new_folder(out) as folder:
        write_json_atomic(folder / CONFIG_FILE, asdict(ModelConfig(**weights.model.arguments())))
        write_atomic(folder / WEIGHTS_FILE, partial(_write_safetensors, weights, DTYPES[dtype]))
        if save_tokenizer is not None:
            save_tokenizer(folder / TOKENIZER_FOLDER)
        for name, content in files.items():
            (folder / name).write_bytes(content)


def _check_new(out: Path, dtype: str, force: bool) -> None:
    if dtype not in DTYPES:
        raise UserError(f"--dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    if out.exists() and not force:
        raise UserError(f"{out}: exists already; give --force to replace it, or another name")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder; make it first")


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place when the block ends, and is removed if it raises.

    What it replaces is `.NAME.old` for a moment. If a kill left it there, it is put back first.
    """
    folder, old = (path.with_name(f".{path.name}.{end}") for end in ("tmp", "old"))
    if old.exists() and not path.exists():
        old.rename(path)
    for leftover in (folder, old):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        if path.exists():
            path.rename(old)
        try:
            folder.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _converted(tensor: Reader, dtype: torch.dtype, name: str) -> Tensor:
    values = tensor(name).to(dtype)
    if dtype == torch.float16 and not values.isfinite().all():
        raise UserError(f"{name}: has values that fp16 cannot hold; use --dtype bf16 or fp32")
    return values


def _write_safetensors(weights: Weights, dtype: torch.dtype, file: IO[bytes]) -> None:
    metadata = {METADATA_KEY: json.dumps(weights.metadata())}
    with weights.reading() as tensor:
        values = partial(_converted, tensor, dtype)
        entries = [Entry(name, dtype, shape, partial(values, name)) for name, shape in weights.shapes.items()]
        for block in safetensors_blocks(metadata, entries):
            file.write(block)


def _write_published(weights: Weights, dtype: torch.dtype, file: IO[bytes]) -> None:
    """Write with `torch.save`, which needs all tensors at once: they are mapped from an unnamed temporary file.

    A model without a null class has no row for it, and its arguments say how many classes there are.
    """
    shapes, arguments = dict(weights.shapes), {}
    if not weights.has_null_class:
        classes = weights.model.num_classes
        shapes[CLASS_EMBEDDING] = (classes, *shapes[CLASS_EMBEDDING][1:])
        arguments = {"args": argparse.Namespace(num_classes=classes)}
    with TemporaryFile(dir=Path(file.name).parent) as temporary:
        offsets = _write_raw(weights, shapes, dtype, temporary)
        mapped = mmap.mmap(temporary.fileno(), 0, access=mmap.ACCESS_COPY)
        tensors = {
            name: torch.frombuffer(mapped, dtype=dtype, offset=offsets[name], count=prod(shape)).view(shape)
            for name, shape in shapes.items()
        }
        torch.save({"model": tensors, **arguments}, file)


def _write_raw(weights: Weights, shapes: dict[str, Shape], dtype: torch.dtype, file: IO[bytes]) -> dict[str, int]:
    """Write the bytes of all tensors without a header, as many rows as `shapes` has. Return the offset of each."""
    offsets = {}
    with weights.reading() as tensor:
        for name, shape in shapes.items():
            offsets[name] = file.tell()
            for block in bytes_of(_converted(tensor, dtype, name)[: shape[0]]):
                file.write(block)
    file.flush()
    return offsets
