"""Sampling from Python: `npp_ds.load(...).sample(...)` gives the images of `npp sample` as PIL images."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from npp_ds.checkpoint.open import Weights, open_weights
from npp_ds.distributed.environment import choose_device, choose_dtype
from npp_ds.sampling.logits_processing import Options
from npp_ds.sampling.request import Request, find_tokenizer, parse_classes, stage_warning
from npp_ds.sampling.sampler import build_model, labels_of, sample_images
from npp_ds.tokenizer.vq import VQModel


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
