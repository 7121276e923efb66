"""The likelihood of held-out codes under a model: its mean, for training runs, and figures by position in the image."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt, log
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from npp_ds import __version__
from npp_ds.checkpoint.open import Weights
from npp_ds.data.loader import EvalLoader
from npp_ds.data.manifest import Coding, meaning_mismatches, size_mismatches
from npp_ds.data.store import stage
from npp_ds.errors import UserError
from npp_ds.sampling.sampler import DTYPES, build_model
from npp_ds.sizes import num_positions
from npp_ds.utils.records import git_commit

logger = logging.getLogger(__name__)

LOGIT_BYTES = 256 << 20
"""Upper limit for the float32 logits of one forward pass: 16 images of 256 codes out of 16384."""
TOP = 5

Batches = Iterable[tuple[Tensor, Tensor, int]]


@dataclass(frozen=True)
class Likelihood:
    """Means over `images` by patch position, float64 [grid, grid] each; grid is the number of patches in a row.

    `nll` is in nats per code. `top1` and `top5` are the shares of codes that are the model's likeliest prediction, and
    among its five likeliest. At a patch side above 1 each position holds the mean over the codes of its patch.
    """

    patch_side: int
    images: int
    nll: np.ndarray
    top1: np.ndarray
    top5: np.ndarray

    @property
    def codes_per_image(self) -> int:
        """The number of codes of an image, at patch side 1."""
        return self.nll.size * self.patch_side**2

    @property
    def bits_per_image(self) -> float:
        """The length of an image's codes. The codes of a patch are independent of each other given all before them."""
        return float(self.nll.mean()) / log(2) * self.codes_per_image


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _on(device: torch.device | str, batch: tuple[Tensor, Tensor, int]) -> tuple[Tensor, Tensor, int]:
    """Move the real rows of a batch to the device, one row if none is real. Return them and the number of real ones."""
    codes, labels, count = batch
    rows = slice(max(count, 1))
    return codes[rows].to(device, non_blocking=True), labels[rows].to(device, non_blocking=True), count


def _over_ranks(total: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


@torch.no_grad()
def mean_nll(model: nn.Module, loader: Batches, device: torch.device | str) -> float:
    """Return the mean of `model(codes, labels)` over all images of all ranks, in nats per code.

    `model` is a `Transformer`, or a DeepSpeed engine that wraps one. `loader` yields (codes int64 [B, N, k], labels
    int64 [B], count), of which only the first `count` rows are real. Every rank calls the model once per batch, also
    for batches without a real row, which have no weight: with ZeRO-3 each call gathers parameters from all ranks. So if
    torch.distributed is initialised, all ranks must call this function with loaders of equal length. The model is in
    eval mode meanwhile, then in its previous mode. Raises ValueError if no rank has a real row.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)  # nats, images
    with _eval_mode(model):
        for batch in loader:
            codes, labels, count = _on(device, batch)
            total[0] += model(codes, labels).double() * count
            total[1] += count
    nats, images = _over_ranks(total).tolist()
    if not images:
        raise ValueError("mean_nll: the loader has no image")
    return nats / images


@torch.no_grad()
def likelihood_by_position(model: nn.Module, loader: Batches, device: torch.device | str) -> Likelihood:
    """Return `mean_nll` by position, and the accuracy of predictions. `loader` and ranks are as for `mean_nll`.

    The mean of `nll` is `mean_nll`. All float32 logits of a batch exist at once, so `loader` should give at most
    `images_at_a_time` images per batch.
    """
    total, images = torch.zeros((), dtype=torch.float64, device=device), 0
    with _eval_mode(model):
        for batch in loader:
            codes, labels, count = _on(device, batch)
            shape = codes.shape[1:]
            total = total + _figures(model(codes, labels, output="logits"), codes)[:, :count].sum(1)
            images += count
    total = _over_ranks(torch.cat([total.flatten(), total.new_tensor([images])]))
    if not (images := round(total[-1].item())):
        raise ValueError("likelihood_by_position: the loader has no image")
    grid, side = map(isqrt, shape)
    return Likelihood(side, images, *(total[:-1] / images).view(3, grid, grid).cpu().numpy())


def _figures(logits: Tensor, codes: Tensor) -> Tensor:
    """Return float64 [3, B, N] (nats, top-1 accuracy, top-5 accuracy) for logits [B, N, V] and codes [B, N, k]."""
    nats = logits.logsumexp(-1, keepdim=True) - logits.gather(-1, codes)
    predictions = logits.topk(min(TOP, logits.shape[-1])).indices
    right = codes[..., None] == predictions[..., None, :]
    return torch.stack([nats.double(), right[..., 0].double(), right.any(-1).double()]).mean(-1)


def images_at_a_time(positions: int, vocab_size: int) -> int:
    """Return how many images have float32 logits, at this many positions each, within `LOGIT_BYTES`; at least one."""
    return max(1, LOGIT_BYTES // (4 * positions * vocab_size))


def likelihood_of(
    source: Weights,
    shards: str | Path,
    *,
    cache_dir: str | Path | None = None,
    limit: int | None = None,
    patch_side: int = 1,
    precision: str = "fp32",
    device: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Return the likelihood of held-out code shards under trained weights, as a dict for JSON.

    `limit` measures that many images. Matrix products are computed in `precision` from float32 weights, the softmax in
    float32, sums in float64. Raises UserError if the shards do not fit the model, or if the model was trained on codes
    of another tokenizer or on other classes. A run with data.allow_mismatch accepts its own data.val.
    """
    if precision not in DTYPES:
        raise UserError(f"precision: found {precision!r}, expected one of {', '.join(DTYPES)}")
    store = stage(shards, cache_dir)
    _check_fit(source, store.manifest.coding, shards)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    positions = num_positions(store.manifest.grid_size, patch_side) or 1
    batch_size = images_at_a_time(positions, source.model.vocab_size)
    loader = EvalLoader(store, patch_side, batch_size, rank=0, world_size=1, limit=limit)
    model = build_model(source, device)
    started = time.perf_counter()
    with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
        found = likelihood_by_position(model, _counted(loader, progress), device)
    overall = {"nats_per_code": found.nll, "top1_accuracy": found.top1, "top5_accuracy": found.top5}
    return {
        **{name: float(values.mean()) for name, values in overall.items()},
        "bits_per_image": found.bits_per_image,
        "codes_per_image": found.codes_per_image,
        "patch_side": patch_side,
        "images": found.images,
        "by_position": {name: values.tolist() for name, values in overall.items()},
        "precision": precision,
        "weights": {
            "path": str(source.path),
            "name": source.name,
            "step": source.step,
            "kind": source.variant,
            "sha256": source.sha256,
        },
        "shards": {"path": str(shards), "fingerprint": store.manifest.fingerprint(), "images": len(store)},
        "tokenizer": {"name": store.manifest.tokenizer.name, "sha256": store.manifest.tokenizer.sha256},
        "seconds": round(time.perf_counter() - started, 3),
        "created_by": f"npp_ds {__version__}",
        "git_commit": git_commit(),
    }


def _counted(loader: EvalLoader, progress: Callable[[int, int], None]) -> Iterator[tuple[Tensor, Tensor, int]]:
    done = 0
    for batch in loader:
        yield batch
        done += batch[2]
        progress(done, loader.num_samples)


def _check_fit(source: Weights, coding: Coding, shards: str | Path) -> None:
    problems, differences = size_mismatches(coding, source.coding), meaning_mismatches(coding, source.coding)
    data = source.config.data if source.config else None
    if differences and data and data.allow_mismatch and str(shards) == data.val:
        for fact, found, expected in differences:
            logger.warning(f"{shards}: {fact} is {found}, the model was trained with {expected} (data.allow_mismatch)")
        differences = []
    if texts := [f"{fact} {found}, the model has {expected}" for fact, found, expected in problems + differences]:
        raise UserError(f"{shards}: not codes for the model of {source.path}: {'; '.join(texts)}; name other shards")
