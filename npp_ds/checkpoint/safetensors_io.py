"""Files of tensors: read them without running code that they contain, and write them one tensor at a time."""

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from npp_ds.errors import UserError

if TYPE_CHECKING:
    from safetensors import safe_open

Shape = tuple[int, ...]
BLOCK = 1 << 24  # bytes written at a time
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the names of the CLI options
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_WEIGHTS = {**_NAMES, torch.float64: "F64"}  # the types that weights may be stored in, with their safetensors names
WRAPPINGS = ("model", "module", "state_dict")
"""Entries of checkpoint files that hold the weights: of DDP, of DeepSpeed, of many others; FSDP's files have none."""
_WRAPPERS = {  # parts of parameter names that DistributedDataParallel, torch.compile, FSDP and checkpointing add
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
_FOREIGN = re.compile(r"GLOBAL (\S+) was not an allowed global")  # torch's message for an object that it refuses


def read_torch(path: Path) -> Any:
    """Return what `torch.save` wrote. Its tensors are memory-mapped, so only those that are used are read.

    A file of the old format, and one whose entries somebody has compressed, is read whole.

    Besides tensors and plain values the file may hold an argparse.Namespace, as published checkpoints do. Raises
    UserError for any other object and for damaged files.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except (
        zipfile.BadZipFile,
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
    ) as error:
        # torch's own text is not shown: it advises weights_only=False, which runs code that the file contains.
        if foreign := _FOREIGN.search(str(error)):
            raise UserError(
                f"{path}: holds more than tensors and plain values ({foreign[1]}); it was not loaded, because loading "
                "such objects can run code: ask its maker for a file of tensors alone"
            ) from None
        raise UserError(f"{path}: damaged, or not a PyTorch checkpoint; fetch it again") from None


def unwrapped_tensors(path: Path, content: Any, entries: Sequence[str] = WRAPPINGS) -> dict[str, Tensor]:
    """Return the tensors in the first of `entries` that a checkpoint has, or at its top, by names without wrappers.

    Raises UserError if there are none.
    """
    content = content if isinstance(content, dict) else {}
    state = next((content[entry] for entry in entries if entry in content), content)
    items = state.items() if isinstance(state, dict) else ()
    tensors = {_plain(name): value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: no weights under {', '.join(entries)} or at the top; found {some_names(content)}")
    return tensors


def _plain(name: str) -> str:
    """Remove the parts that wrappers add, also around single layers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def some_names(content: Mapping) -> str:
    """Return the first names of a dict, for messages."""
    return ", ".join(map(str, list(content)[:3])) or "nothing"


def _can_be_mapped(path: Path) -> bool:
    """Return whether a file is a zip archive without compression; torch (2.14) maps compressed entries as they are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


@contextmanager
def opened_safetensors(path: Path) -> "Iterator[safe_open]":
    """Open a safetensors file, memory-mapped. Raises UserError for a damaged file, also while it is being read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or no safetensors file ({error}); fetch it again") from error


def shapes_of_weights(path: Path, file: "safe_open") -> dict[str, Shape]:
    """Return the shape of each tensor of an open safetensors file. Raises UserError for a type that is no weight's."""
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    if wrong := next((name for name, part in slices.items() if part.get_dtype() not in _WEIGHTS.values()), None):
        raise _no_weights(path, wrong, slices[wrong].get_dtype())
    return {name: tuple(part.get_shape()) for name, part in slices.items()}


def check_type(path: Path, name: str, tensor: Tensor) -> None:
    """Raise UserError unless a tensor of a file can hold weights: dense, fp32, bf16, fp16 or fp64."""
    if tensor.dtype not in _WEIGHTS:
        raise _no_weights(path, name, str(tensor.dtype))
    if tensor.layout != torch.strided or tensor.is_meta:
        raise _no_weights(path, name, "without values" if tensor.is_meta else str(tensor.layout))


def as_weights(path: Path, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of a file as float32. Raises UserError if it cannot hold weights or holds NaN or infinity.

    The check takes no memory beside the tensor.
    """
    check_type(path, name, tensor)
    if tensor.numel() > tensor.untyped_storage().nbytes() // tensor.itemsize:
        raise _no_weights(path, name, "a few stored values, repeated")  # 4 bytes can stand for any number
    values = tensor.float()
    if values.numel() and not torch.stack(values.aminmax()).isfinite().all():  # both are NaN if one value is
        wrong = values.numel() - int(values.isfinite().sum())
        raise UserError(
            f"{path}: {name}: {wrong:,} of {values.numel():,} values are NaN or infinite, expected finite weights; use "
            "another checkpoint, or make or fetch the file again"
        )
    return values


def _no_weights(path: Path, name: str, found: str) -> UserError:
    return UserError(
        f"{path}: {name:.80} is {found}, expected a floating-point type: dense fp32, bf16, fp16 or fp64; "
        "convert the file"
    )


def misfits(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> str:
    """Describe up to three differences in names and shapes between the tensors of a file and a model; "" if none."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name:.80} does not belong there" for name in found if name not in expected]
    problems += [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return "; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")


class Entry(NamedTuple):
    """A tensor to be written. `values()` returns it in this dtype and shape; it is called when the tensor is due."""

    name: str
    dtype: torch.dtype
    shape: Shape
    values: Callable[[], Tensor]


def safetensors_blocks(metadata: dict[str, str], entries: Iterable[Entry]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file of fp32, bf16 or fp16 tensors, with one tensor in memory at a time.

    `safetensors.torch.save_file` needs all tensors at once.
    """
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for entry in entries:
        begin, end = end, end + prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield len(encoded).to_bytes(8, "little") + encoded
    for entry in entries:
        yield from bytes_of(entry.values())


def bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor on any device, in blocks."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), BLOCK):
        yield data[start : start + BLOCK]
