"""Mean negative log-likelihood per code, on one process or on all ranks of a training run."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


@torch.no_grad()
def mean_nll(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor, int]], device: torch.device | str) -> float:
    """Mean over all images of all ranks of `model(codes, labels)`, in nats per code at the loader's patch side.

    `model` is a `Transformer` or a DeepSpeed engine around one. `loader` yields (codes int64 [B, N, k], labels int64
    [B], count), of which only the first `count` rows are real. Every rank calls the model once per batch, also for
    batches of no real row (they weigh nothing), because with ZeRO-3 each call gathers weights from all ranks; so when
    torch.distributed is initialised, all ranks must call this with equally long loaders. The model is in eval mode
    meanwhile, then in the mode it had. Raises ValueError when no rank has a real row.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)  # nats, images
    try:
        for codes, labels, count in loader:
            rows = slice(max(count, 1))
            loss = model(codes[rows].to(device, non_blocking=True), labels[rows].to(device, non_blocking=True))
            total[0] += loss.double() * count
            total[1] += count
    finally:
        model.train(was_training)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    nats, images = total.tolist()
    if not images:
        raise ValueError("mean_nll: the loader has no image")
    return nats / images
