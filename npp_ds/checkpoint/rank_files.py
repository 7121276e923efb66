"""The files of a checkpoint: each rank writes one safetensors file with its fragments of every saved state.

A state is "master" (the fp32 weights), a moment of the optimizer, or "ema" (the average of the weights). The tensor
`STATE/NAME` is 1-D float32, a contiguous range of the flattened parameter NAME. The metadata entry "starts" maps each
NAME to the first element of its range. Readers copy the ranges that they need, so any number of ranks can read what any
other number of ranks wrote.
"""

import hashlib
import json
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from npp_ds.checkpoint.safetensors_io import Entry, safetensors_blocks
from npp_ds.errors import UserError
from npp_ds.utils.files import parse_json

MASTER = "master"  # the state that holds the fp32 weights


@dataclass(frozen=True)
class Fragment:
    """Elements `start` .. `start + numel` of the flattened parameter `name`.

    On its rank they begin at element `offset` of the flat partition number `partition`.
    """

    name: str
    start: int
    numel: int
    partition: int
    offset: int

    def of(self, partitions: list[Tensor]) -> Tensor:
        """Return the view [numel] of this fragment in tensors that are shaped like the flat partitions."""
        return partitions[self.partition].narrow(0, self.offset, self.numel)


def file_of(rank: int, world_size: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_state(
    path: Path,
    fragments: list[Fragment],
    states: dict[str, list[Tensor]],
    beat: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write this rank's fragments of every state to `path`, flushed to disk. Return {"bytes": .., "sha256": ..}.

    `states` maps the name of a state to tensors that are shaped like the flat partitions. The file is written and
    hashed in one pass, with one fragment in host memory at a time. `beat` is called after each block.
    """
    entries = [
        Entry(f"{state}/{f.name}", torch.float32, (f.numel,), partial(f.of, partitions))
        for state, partitions in states.items()
        for f in fragments
    ]
    starts = json.dumps({f.name: f.start for f in fragments})
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for block in safetensors_blocks({"starts": starts}, entries):
            file.write(block)
            digest.update(block)
            beat()
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {"bytes": size, "sha256": digest.hexdigest()}


class SavedState:
    """The tensors of a checkpoint folder, read by name and range, whichever ranks wrote them. A context manager.

    The files are memory-mapped, so only the requested ranges are read. Raises UserError for files of another kind.
    """

    def __init__(self, folder: Path, files: Iterable[str], shapes: Mapping[str, Sequence[int]]):
        self.folder, self.shapes = folder, shapes
        self._stack = ExitStack()
        self._parts: dict[str, list[tuple[int, int, Any]]] = {name: [] for name in shapes}
        try:
            for file in files:
                self._open(folder / file)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, path: Path) -> None:
        try:
            if not path.is_file():
                raise FileNotFoundError("missing, or no regular file")
            handle = self._stack.enter_context(safe_open(path, framework="pt"))
            starts = parse_json(handle.metadata()["starts"])
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            if wrong := [n for n, part in slices.items() if part.get_dtype() != "F32" or len(part.get_shape()) != 1]:
                raise ValueError(f"{wrong[0]:.80} is not one-dimensional float32")
            for name, start in starts.items():
                (numel,) = slices[f"{MASTER}/{name}"].get_shape()
                self._parts[name].append((operator.index(start), start + numel, handle))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: not a file of a checkpoint of this model ({error!r}); restore it, or use another checkpoint"
            ) from error

    def __enter__(self) -> "SavedState":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def copy_to(self, target: Tensor, state: str, name: str, start: int) -> None:
        """Fill `target` [n] with elements start .. start + n of a state of the flattened parameter `name`.

        Raises UserError if the files do not hold all of them.
        """
        stop, copied = start + len(target), 0
        for begin, end, handle in self._parts[name]:
            first, last = max(start, begin), min(stop, end)
            if first < last:
                part = handle.get_slice(f"{state}/{name}")[first - begin : last - begin]
                copied += len(part)
                if len(part) == last - first:  # else this state has fewer elements than the weights
                    target[first - start : last - start].copy_(part)
        if copied != len(target):
            raise UserError(
                f"{self.folder}: {state}/{name} has {copied} of the elements {start} .. {stop}; use another checkpoint"
            )

    def whole(self, state: str, name: str) -> Tensor:
        """Return a state of the whole parameter `name`, float32 on the CPU, in the parameter's shape."""
        tensor = torch.empty(prod(self.shapes[name]))
        self.copy_to(tensor, state, name, 0)
        return tensor.view(tuple(self.shapes[name]))
