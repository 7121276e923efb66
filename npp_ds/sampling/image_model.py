"""Sampling from Python: `npp_ds.load(...).sample(...)` gives the images of `npp sample` as PIL images.

Also the tokenizer and the class names that belong to weights.
"""

import warnings
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from npp_ds.checkpoint.export import TOKENIZER_FOLDER
from npp_ds.checkpoint.open import Weights, open_weights
from npp_ds.distributed.environment import choose_device, choose_dtype
from npp_ds.errors import UserError, did_you_mean, similar_names
from npp_ds.sampling.job import Request
from npp_ds.sampling.logits_processing import Options
from npp_ds.sampling.sampler import build_model, labels_of, sample_images
from npp_ds.tokenizer.loading import tokenizer_of
from npp_ds.tokenizer.vq import VQModel
from npp_ds.utils.hub import WEIGHTS_FILE

NO_NAMES = "; the names of the classes are not known: a run has those of its shards, so run this where `data.train` is"


class ImageModel:
    """Trained weights and their tokenizer on a device, ready to sample; `load` makes one.

    `model` is the `Transformer` in `dtype`, `tokenizer` the `VQModel`, `weights` says what was loaded.
    """

    def __init__(self, weights: Weights, tokenizer: VQModel, device: str, dtype: str):
        self.weights, self.dtype = weights, dtype
        self.tokenizer = tokenizer.to(device)
        self.model = build_model(weights, device, dtype)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class; empty if unknown."""
        return self.weights.class_names

    def sample(
        self,
        classes: Sequence[int | str] | int | str | None = None,
        per_class: int = 1,
        *,
        cfg_scale: float = 1.0,
        seed: int = 0,
        image_size: int | None = None,
        batch_size: int = 64,
        **options: Any,
    ) -> list[Image.Image]:
        """Return `per_class` images of each class, one of each class in turn: those of `npp sample` with these options.

        `classes` are numbers or names in any letter case; None means all. `options` are the other fields of
        `npp_ds.sampling.logits_processing.Options`: temperature, top_k, top_p, cfg_schedule, cfg_power, cfg_interval,
        patch_side. Raises UserError that names everything that is impossible.
        """
        wanted = [classes] if isinstance(classes, int | str) else classes
        chosen = parse_classes(wanted, self.weights.model.num_classes, self.class_names)
        settings = Options(seed=seed, cfg_scale=cfg_scale, **options)
        count = per_class * len(chosen)
        request = Request(chosen, count, options=settings, image_size=image_size, dtype=self.dtype)
        request.check(self.weights, self.tokenizer)
        _warn(stage_warning(self.weights, settings))
        numbers = np.arange(count)
        labels = labels_of(numbers, chosen, request.labels, seed)
        images = sample_images(
            self.model,
            self.tokenizer.decode,
            labels,
            numbers,
            settings,
            batch_size=min(batch_size, request.part_size),
            image_size=image_size,
        )
        return [Image.fromarray(image) for image in images]


def load(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    step: int | None = None,
    weights: str = "raw",
    device: str = "auto",
    dtype: str = "auto",
    heads: int | None = None,
    grid_size: int | None = None,
) -> ImageModel:
    """Load a run folder, a file or folder of `npp export`, or a published checkpoint, to sample from.

    The arguments are the options of `npp sample`: `tokenizer` is a name or file (needed for a published checkpoint),
    `weights` raw or ema, `device` auto, cpu or cuda, `dtype` fp32, bf16 or auto (bf16 on a GPU). Raises UserError if
    there are no such weights, or no tokenizer that made their codes.
    """
    device = choose_device(device, 0)
    found = open_weights(source, step=step, variant=weights, n_heads=heads, grid_size=grid_size)
    _warn(found.guess_warning())
    return ImageModel(found, find_tokenizer(found, tokenizer), device, choose_dtype(dtype, device))


def _warn(text: str | None) -> None:
    if text:
        warnings.warn(text, stacklevel=3)


def parse_classes(wanted: Sequence[int | str] | None, num_classes: int, class_names: Sequence[str]) -> list[int]:
    """Return class numbers for numbers or names; None means all classes. Letter case is ignored unless names need it.

    A text of digits is a name if a class has it, else a number.

    Raises UserError that names all unknown classes, with similar names, or all names of several classes, with numbers.
    """
    if wanted is None:
        return list(range(num_classes))
    exact: dict[str, list[int]] = {}
    in_any_case: dict[str, list[int]] = {}
    for i, name in enumerate(map(_normal, class_names)):
        exact.setdefault(name, []).append(i)
        in_any_case.setdefault(name.casefold(), []).append(i)

    def numbers_of(text: str) -> list[int]:
        named = exact.get(_normal(text)) or in_any_case.get(_normal(text).casefold())
        return named or [int(text) if text.isdecimal() else -1]

    choices = [[int(w)] if isinstance(w, Integral) else numbers_of(str(w)) for w in wanted]
    shared = [(w, choice) for w, choice in zip(wanted, choices, strict=True) if len(choice) > 1]
    if shared:
        texts = [f"{w} is the name of {' and '.join(map(str, choice))}" for w, choice in shared]
        raise UserError(f"classes: {'; '.join(texts)}; give the number of the one you mean")
    found = [choice[0] for choice in choices]
    unknown = [str(w) for w, c in zip(wanted, found, strict=True) if not 0 <= c < num_classes]
    if unknown or not found:
        hint = did_you_mean([name for w in unknown for name in similar_names(_normal(w), class_names)])
        names = f" or one of {', '.join(class_names[:20])}" if class_names else NO_NAMES
        raise UserError(
            f"classes: found {', '.join(unknown) or 'none'}{hint or ','} expected numbers 0..{num_classes - 1}{names}"
        )
    return found


def split_classes(text: str, class_names: Sequence[str]) -> list[str]:
    """Split a comma-separated list of class numbers and names. A known name that contains commas stays whole."""
    words, found = _normal(text).split(", "), []
    names = {_normal(name).casefold() for name in class_names}
    longest = max((name.count(",") for name in names), default=0) + 1
    while words:
        sizes = range(min(longest, len(words)), 0, -1)
        size = next((n for n in sizes if ", ".join(words[:n]).casefold() in names), 1)
        found.append(", ".join(words[:size]))
        words = words[size:]
    return found


def _normal(name: str) -> str:
    """Return a class name with one space after each comma."""
    return ", ".join(map(str.strip, name.split(",")))


def find_tokenizer(weights: Weights, tokenizer: str | Path | None = None) -> VQModel:
    """Load the tokenizer that decodes the codes of these weights.

    It is the one given by name or file, else that of the run's config or of the exported folder, else an available one
    that made the codes of the training data. Raises UserError if none is known, and if another one made those codes.
    """
    beside = weights.path.parent / TOKENIZER_FOLDER
    if weights.config:
        tokenizer = tokenizer or weights.config.data.tokenizer
    elif weights.path.name == WEIGHTS_FILE and beside.is_dir():
        tokenizer = tokenizer or beside
    return tokenizer_of(weights.tokenizer, tokenizer)


def stage_warning(weights: Weights, options: Options) -> str | None:
    """Return a warning if the model is sampled at another patch side than that of its last training stage."""
    if weights.patch_side in (None, options.patch_side):
        return None
    return (
        f"these weights are from a stage of patch side {weights.patch_side} and are sampled at "
        f"{options.patch_side}; sample them with --patch-side {weights.patch_side}"
    )
