"""Published LlamaGen and NPP checkpoints (`c2i_B_256.pt` ..): find their weights and infer the model from the tensors.

The weights are under `model` (DDP), `module` (DeepSpeed) or `state_dict`, or they are the file's content itself (FSDP).
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from npp_ds.checkpoint.safetensors_io import WRAPPINGS, Shape, check_type, read_torch, some_names, unwrapped_tensors
from npp_ds.config.schema import ModelSection
from npp_ds.errors import UserError
from npp_ds.sizes import SIZES, ffn_hidden

CLASS_EMBEDDING = "cls_embedding.embedding_table.weight"
HEAD_DIM = 64
OTHER_HEADS = {(24, 3200): 32, (32, 4096): 32}  # LlamaGen's 3B and 7B: (n_layers, dim) whose head width is not 64
GRID_SIZE = 16
_BUFFERS = ("freqs_cis", "causal_mask", "k_cache", "v_cache")  # computed by the published code when it samples


class PublishedModel(NamedTuple):
    """What a published checkpoint shows without reading its tensors. `step` is None if the file does not hold it.

    `shapes` are those of a model with a null class, as `reading_published` yields the tensors. `has_null_class` is
    false if the checkpoint was trained without class dropout and has none.
    """

    step: int | None
    model: ModelSection
    shapes: dict[str, Shape]
    grid_is_guessed: bool
    has_null_class: bool


def inspect_published(path: Path, variant: str, n_heads: int | None, grid_size: int | None) -> PublishedModel:
    """Infer the model of a published checkpoint; variant "ema" is the average that LlamaGen's training saves.

    Most of these files contain neither the number of heads nor the grid size. Then `n_heads` and `grid_size` apply. If
    they are None, heads are 64 wide (except for LlamaGen's 3B and 7B) and the grid is 16. Raises UserError if the
    tensors are not those of such a model.
    """
    content = read_torch(path)
    tensors, buffers = _tensors_of(path, content, variant)
    n_heads = _saved_heads(buffers, tensors) or n_heads
    grid_size = _saved_grid_size(content, buffers) or grid_size
    num_classes, has_null_class = _classes(path, content, tensors)
    model = _infer_model(path, tensors, n_heads, grid_size or GRID_SIZE, num_classes)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes[CLASS_EMBEDDING] = (num_classes + 1, *shapes[CLASS_EMBEDDING][1:])
    steps = content.get("steps")
    steps = steps if type(steps) is int and 0 <= steps < 2**63 else None
    return PublishedModel(steps, model, shapes, grid_size is None, has_null_class)


@contextmanager
def reading_published(path: Path, variant: str, num_classes: int) -> Iterator[Callable[[str], Tensor]]:
    """Yield a function: parameter name -> its tensor on the CPU. A missing null class is a row of zeros."""
    tensors, _ = _tensors_of(path, read_torch(path), variant)
    table = tensors[CLASS_EMBEDDING]
    if len(table) == num_classes:
        tensors[CLASS_EMBEDDING] = torch.cat([table, table.new_zeros(1, *table.shape[1:])])
    yield tensors.__getitem__


def _tensors_of(path: Path, content: Any, variant: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (parameters, buffers) of a variant, by their names without wrappers."""
    if variant == "ema" and not (isinstance(content, dict) and "ema" in content):
        raise UserError(f"{path}: holds no `ema` entry, so no averaged weights; use the raw ones")
    tensors = unwrapped_tensors(path, content, ("ema",) if variant == "ema" else WRAPPINGS)
    buffers = {name: value for name, value in tensors.items() if name.rpartition(".")[2] in _BUFFERS}
    parameters = {name: value for name, value in tensors.items() if name not in buffers}
    for name, tensor in parameters.items():
        check_type(path, name, tensor)
    return parameters, buffers


def _saved_heads(buffers: dict[str, Tensor], tensors: dict[str, Tensor]) -> int | None:
    """Return the number of heads by the rotary table [positions, head_dim / 2, 2], None if it was not saved."""
    table, norm = buffers.get("freqs_cis"), tensors.get("norm.weight")
    if norm is None or table is None or table.ndim != 3 or not table.shape[1]:
        return None
    return norm.numel() // (2 * table.shape[1])


def _saved_grid_size(content: dict, buffers: dict[str, Tensor]) -> int | None:
    """Return the grid size by the rotary table (one row per code, one for the class) or the training arguments."""
    if (table := buffers.get("freqs_cis")) is not None and table.ndim == 3:
        return isqrt(len(table))
    arguments = _arguments(content)
    image_size, downsample_size = arguments.get("image_size"), arguments.get("downsample_size")
    if isinstance(image_size, int) and isinstance(downsample_size, int) and image_size >= downsample_size > 0:
        return image_size // downsample_size
    return None


def _arguments(content: dict) -> dict[str, Any]:
    """Return the arguments of the training script, if the file holds them."""
    return vars(content["args"]) if isinstance(content.get("args"), Namespace) else {}


def _matrix(path: Path, tensors: dict[str, Tensor], name: str) -> Shape:
    """Return the shape of a matrix. Raises UserError if there is no such matrix."""
    found = tuple(tensors[name].shape) if name in tensors else ()
    if len(found) != 2:
        what = f"is {list(found)}" if name in tensors else "is missing"
        raise UserError(
            f"{path}: not the weights of a class-conditional LlamaGen model: {name} {what}; found {some_names(tensors)}"
        )
    return found


def _classes(path: Path, content: dict, tensors: dict[str, Tensor]) -> tuple[int, bool]:
    """Return the number of classes, and whether there is a null class, which LlamaGen adds for class dropout only.

    Without the training script's arguments the last row of the table counts as the null class.
    """
    rows, known = _matrix(path, tensors, CLASS_EMBEDDING)[0], _arguments(content).get("num_classes")
    if not isinstance(known, int):
        return rows - 1, True
    if rows - known not in (0, 1):
        raise UserError(
            f"{path}: {CLASS_EMBEDDING} has {rows} rows, but args.num_classes is {known}, expected {known} rows, or "
            f"{known + 1} with the null class; fetch a file whose arguments are its own"
        )
    return known, rows > known


def _infer_model(
    path: Path, tensors: dict[str, Tensor], known_heads: int | None, grid_size: int, num_classes: int
) -> ModelSection:
    """Return the model section of tensors that are named as published. Raises UserError."""
    shape = partial(_matrix, path, tensors)
    vocab_size, dim = shape("tok_embeddings.weight")
    n_layers = next(i for i in range(len(tensors) + 1) if f"layers.{i}.attention.wqkv.weight" not in tensors)
    key_and_value_rows = shape("layers.0.attention.wqkv.weight")[0] - dim
    n_heads = known_heads or OTHER_HEADS.get((n_layers, dim)) or dim // HEAD_DIM
    if not n_heads or not dim or dim % n_heads or (known_heads is None and dim % HEAD_DIM):
        heads = f"{known_heads} heads" if known_heads else f"heads of width {HEAD_DIM}, the usual one"
        raise UserError(f"{path}: its width {dim} does not divide into {heads}; give the number of heads (--heads)")
    n_kv_heads, rest = divmod(key_and_value_rows, 2 * (dim // n_heads))
    if rest:
        raise UserError(
            f"{path}: {key_and_value_rows} rows of keys and values do not fit heads that are {dim // n_heads} wide; "
            "give the number of heads (--heads)"
        )
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads}
    size = next((name for name, known in SIZES.items() if known == sizes), None)
    try:
        return ModelSection(
            **({"size": size} if size else sizes),
            n_kv_heads=None if n_kv_heads == n_heads else n_kv_heads,
            vocab_size=vocab_size,
            grid_size=grid_size,
            num_classes=num_classes,
            ffn_multiple_of=_ffn_multiple_of(dim, shape("layers.0.feed_forward.w1.weight")[0]),
        )
    except ValidationError as error:
        found = error.errors()[0]
        raise UserError(
            f"{path}: no model can have its shape: {found['loc'][0]} {found['input']}: {found['msg']}"
        ) from error


def _ffn_multiple_of(dim: int, hidden: int) -> int:
    """Return a rounding that results in this feed-forward width, the published one (256) if possible."""
    return next((m for m in (256, 128, 64, 32, 16, 8, 4, 2, 1) if ffn_hidden(dim, m) == hidden), hidden)
