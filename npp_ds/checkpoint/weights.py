"""Trained weights that have been found: what is known of them, and reading them tensor by tensor."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from npp_ds.checkpoint.safetensors_io import Shape, misfits
from npp_ds.config.schema import ModelSection, RunConfig
from npp_ds.errors import UserError
from npp_ds.model import ModelConfig, Transformer
from npp_ds.utils import files

Shapes = dict[str, Shape]
Reader = Callable[[str], Tensor]  # name -> the whole tensor, float32 on the CPU


class TokenizerId(NamedTuple):
    """The tokenizer whose codes a model was trained on: what it was called there, and the SHA-256 of its file."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Weights:
    """Trained weights that have been found but not read yet; can be sent to other processes.

    `name` and `step` are for people (None: not known); `kind` is "raw", or "ema" for the moving average; `shapes` are
    the parameters'. `config` is that of the run, for weights in a run folder, and `patch_side` that of the stage that
    they were last trained in; `config_hash`, `tokenizer` and `class_names` are None or empty where nothing tells them.
    `grid_is_guessed` where neither the file nor the caller told the grid size.
    """

    path: Path
    name: str
    step: int | None
    kind: str
    model: ModelSection
    shapes: Shapes
    fingerprinted: Path  # the file whose SHA-256 tells these weights from all others
    open_reader: Callable[[], AbstractContextManager[Reader]]
    config: RunConfig | None = None
    patch_side: int | None = None
    config_hash: str | None = None
    tokenizer: TokenizerId | None = None
    class_names: tuple[str, ...] = ()
    grid_is_guessed: bool = False

    @cached_property
    def sha256(self) -> str:
        """Tells these weights from all others of their kind; reads a whole file once."""
        return files.sha256(self.fingerprinted)

    def describe(self) -> str:
        """One line for people: whose weights, of which shape."""
        shape, model = self.model.shape(), self.model
        step = "" if self.step is None else f", step {self.step}"
        grouped = f", {model.n_kv_heads} of keys and values" if model.n_kv_heads else ""
        return (
            f"{self.name}{step}, {self.kind} weights: {model.parameters() / 1e6:.1f}M parameters, "
            f"{shape['n_layers']} layers of {shape['n_heads']} heads{grouped}, dim {shape['dim']}, "
            f"{model.vocab_size} codes, grid {model.grid_size}x{model.grid_size}, {model.num_classes} classes"
        )

    def guess_warning(self) -> str | None:
        """What to say when the grid size is a guess: another one samples and trains without any error."""
        if not self.grid_is_guessed:
            return None
        grid = self.model.grid_size
        return f"WARNING: {self.path} does not tell its grid; taken as {grid}x{grid}, give --grid-size to say otherwise"

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """Inside, a function from a name of `shapes` to its tensor, float32 on the CPU, read when called."""
        with self.open_reader() as reader:
            yield reader

    def read(self) -> dict[str, Tensor]:
        """{name: float32 tensor on the CPU}, all of them."""
        with self.reading() as tensor:
            return {name: tensor(name) for name in self.shapes}


def fitting_shapes(path: Path, found: Shapes, model: ModelSection) -> Shapes:
    """The parameters' shapes of a model, in its order. Raises UserError when those found in a file are others."""
    try:
        with torch.device("meta"):
            state = Transformer(ModelConfig(**model.arguments())).state_dict()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path}: no model can have its shape ({error})") from error
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if problems := misfits(found, expected):
        raise UserError(f"{path}: not the weights of a class-conditional LlamaGen model: {problems}")
    return expected
