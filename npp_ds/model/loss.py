"""The patch cross-entropy (NPP, arXiv 2412.15321, eq. 4), joined with the output projection.

For logits z at a position and the k codes t_1..t_k of its target patch the loss is `logsumexp(z) - mean_i z[t_i]`, so
the logits are computed once whatever k is. Rows are taken in chunks, and the gradient is formed from the logits of a
chunk, so only one chunk of logits exists at a time, and the backward pass only scales the gradient.
`python -m benchmarks.patch_loss` compares this with other ways to compute the same.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from npp_ds.sizes import LOGITS_CHUNK_BYTES

LOSS_KERNELS = ("torch", "triton")


def _loss_and_gradient(softmax: Tensor, z: Tensor, targets: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
    """Return the summed loss of logits z[R, V] and their gradient in z's dtype, in place of z or in `softmax`.

    softmax[at least R, V] is a float32 buffer. Without `differentiate` the second is of no use.
    """
    p = torch.softmax(z, dim=1, dtype=torch.float32, out=softmax[: len(z)])
    # The largest logit, unlike the targets', has a probability that cannot vanish, and so a logarithm.
    log_norm = z.amax(dim=1).float() - p.amax(dim=1).log()
    loss = log_norm.sum() - z.gather(1, targets).sum(dtype=torch.float32) / targets.shape[1]
    if not differentiate:
        return loss, z
    p.scatter_add_(1, targets, p.new_full((), -1 / targets.shape[1]).expand(targets.shape))
    return loss, p if z.dtype == torch.float32 else z.copy_(p)


class _LinearPatchCrossEntropy(torch.autograd.Function):
    """Gradients are summed in the forward pass for the loss times the number of rows; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, differentiate: bool, kernel: str
    ) -> Tensor:
        rows = len(targets)
        need_hidden, need_weight = (differentiate and need for need in ctx.needs_input_grad[:2])
        w = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # In float32 the first chunk's product is written, not added.
        new = torch.empty_like if dtype == torch.float32 else torch.zeros_like
        grad_weight = new(weight, dtype=torch.float32) if need_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk_bytes = LOGITS_CHUNK_BYTES["cpu" if hidden.device.type == "cpu" else "cuda"]
        chunk = max(1, min(rows, chunk_bytes // (4 * weight.shape[0])))
        logits = hidden.new_empty(chunk, weight.shape[0], dtype=dtype)
        differentiate = need_hidden or need_weight
        if kernel == "triton":
            from npp_ds.model.triton_loss import loss_and_gradient
        else:
            loss_and_gradient = partial(_loss_and_gradient, torch.empty_like(logits, dtype=torch.float32))
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            h, t = hidden[part].to(dtype), targets[part]
            z = torch.mm(h, w.T, out=logits[: len(h)])
            loss, grad = loss_and_gradient(z, t, differentiate)
            total += loss
            if grad_hidden is not None:
                grad_hidden[part] = grad @ w
            if grad_weight is not None and dtype == torch.float32:
                grad_weight.addmm_(grad.T, h, beta=min(start, 1))
            elif grad_weight is not None:
                grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.rows, ctx.weight_dtype = rows, weight.dtype
        return total / rows

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_loss / ctx.rows
        if grad_hidden is not None:
            grad_hidden.mul_(scale)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def patch_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, kernel: str = "torch") -> Tensor:
    """Return the mean cross-entropy of the target patches' codes, in nats per code, as a float32 scalar.

    hidden[..., d] are the decoder's outputs, weight[V, d] the output projection (no bias), targets[..., k] int64 codes
    in [0, V). For k = 1 this is next-token cross-entropy. Under autocast the products run in its dtype; the softmax,
    the sums and the accumulation of the weight's gradient are float32. First derivatives only, and once: the backward
    pass uses up the gradients that the forward pass formed, so autograd raises a RuntimeError at a second one. There is
    no `ignore_index` (select the rows to score), no bias and no other reduction; docs/examples/llama_causal_lm.py shows
    how to write them.

    The kernel "torch" runs on every device. "triton" passes over a chunk's logits in one kernel; it needs a CUDA device
    and the package triton. Raises ValueError for another name, and unless `hidden` and `targets` have the same shape up
    to their last dimensions.
    """
    if kernel not in LOSS_KERNELS:
        raise ValueError(f"kernel {kernel!r} is none of {', '.join(LOSS_KERNELS)}")
    if hidden.shape[:-1] != targets.shape[:-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and targets {tuple(targets.shape)}: expected [..., d] and [..., k] with "
            "equal dimensions before the last"
        )
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        rows = hidden.flatten(0, -2), weight, targets.flatten(0, -2)
        return _LinearPatchCrossEntropy.apply(*rows, dtype, torch.is_grad_enabled(), kernel)
