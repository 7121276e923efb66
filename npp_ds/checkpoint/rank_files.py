"""The files of a checkpoint: one safetensors file per rank with its fragments of weights, moments and averages.

A tensor `KIND/NAME` is a contiguous stretch, 1-D float32, of the flattened parameter NAME; the file's metadata says
under "starts" where each begins. Any number of ranks can read what any other number wrote, slice by slice.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
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

MASTER = "master"  # the kind of the weights themselves


@dataclass(frozen=True)
class Fragment:
    """Elements `start .. start + numel` of flattened parameter `name`, at `offset` in a rank's flat `partition`."""

    name: str
    start: int
    numel: int
    partition: int
    offset: int

    def of(self, partitions: list[Tensor]) -> Tensor:
        """View [numel] of this fragment in any list of tensors shaped like the flat partitions."""
        return partitions[self.partition].narrow(0, self.offset, self.numel)


def file_of(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_state(
    path: Path,
    fragments: list[Fragment],
    kinds: dict[str, list[Tensor]],
    beat: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Writes this rank's fragments of every kind to `path`, flushed to disk; returns the file's bytes and SHA-256.

    `kinds` maps a kind to tensors shaped like the flat partitions. Written and hashed in one pass, one fragment in
    host memory at a time. `beat` is called now and then.
    """
    entries = [
        Entry(f"{kind}/{f.name}", torch.float32, (f.numel,), partial(f.of, partitions))
        for kind, partitions in kinds.items()
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
    """The tensors of a checkpoint folder, read by name and range whichever ranks wrote them; a context manager.

    The files are mapped: only what is asked for is read. Raises UserError when they are not such files.
    """

    def __init__(self, folder: Path, files: Iterable[str], shapes: dict[str, tuple[int, ...]]):
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
            handle = self._stack.enter_context(safe_open(path, framework="pt"))
            starts = json.loads(handle.metadata()["starts"])
            for name, start in starts.items():
                numel = handle.get_slice(f"{MASTER}/{name}").get_shape()[0]
                self._parts[name].append((start, start + numel, handle))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: not a file of a checkpoint of this model ({error!r}); restore it, or use another checkpoint"
            ) from error

    def __enter__(self) -> "SavedState":
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def copy_to(self, target: Tensor, kind: str, name: str, start: int) -> None:
        """Fills `target` [n] with elements start .. start + n of flattened parameter `name`. Raises UserError."""
        stop, copied = start + len(target), 0
        for begin, end, handle in self._parts[name]:
            first, last = max(start, begin), min(stop, end)
            if first < last:
                part = handle.get_slice(f"{kind}/{name}")[first - begin : last - begin]
                target[first - start : last - start].copy_(part)
                copied += last - first
        if copied != len(target):
            raise UserError(
                f"{self.folder}: {kind}/{name} has {copied} of the elements {start} .. {stop}; use another checkpoint"
            )

    def whole(self, kind: str, name: str) -> Tensor:
        """The whole parameter `name` of a kind, float32 on the CPU, in its shape."""
        tensor = torch.empty(prod(self.shapes[name]))
        self.copy_to(tensor, kind, name, 0)
        return tensor.view(self.shapes[name])
