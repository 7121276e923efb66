"""A Triton kernel for the patch cross-entropy of logits, with the gradient written over the logits.

Importing this module needs the package triton, so `npp_ds.model.loss` imports it only when it is asked for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS, WARPS = 4096, 8
"""Most columns of a row that are in registers at one time, 16 of them in each thread; not tuned on a GPU yet."""


@triton.jit
def patch_loss_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations as types of its own
    logits, targets, losses, vocab, k, DIFFERENTIATE: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr
):
    """Compute the loss of one row; no other program reads or writes that row, so no atomics are needed."""
    row = tl.program_id(0).to(tl.int64)  # int32 offsets would overflow at 2**31 logits
    logits += row * vocab
    targets += row * k
    lanes = tl.arange(0, LANES)
    target = tl.load(targets + lanes, mask=lanes < k, other=-1)
    known = (target >= 0) & (target < vocab)
    target_logit = tl.load(logits + target, mask=known, other=0.0).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    largest = -3.4028234e38  # finite: a block of -inf alone must not make the sum NaN
    total = 0.0
    for start in range(0, vocab, BLOCK):
        z = tl.load(logits + start + columns, mask=start + columns < vocab, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(z - largest), 0)
    known_codes = tl.sum(known.to(tl.int32), 0)
    total = tl.where(known_codes == k, total, float("nan"))  # a code outside [0, V) has neither a loss nor a gradient
    tl.store(losses + row, largest + tl.log(total) - tl.sum(target_logit, 0) / k)
    if DIFFERENTIATE:
        tl.debug_barrier()  # every thread has read the target logits before any thread overwrites them
        for start in range(0, vocab, BLOCK):
            at = logits + start + columns
            z = tl.load(at, mask=start + columns < vocab, other=float("-inf")).to(tl.float32)
            tl.store(at, (tl.exp(z - largest) / total).to(at.dtype.element_ty), mask=start + columns < vocab)
        count = tl.zeros_like(target_logit)
        for i in range(k):
            count += (target == tl.load(targets + i)).to(tl.float32)
        gradient = tl.exp(target_logit - largest) / total - count / k
        tl.debug_barrier()  # every probability is written before the targets' are overwritten
        # A repeated code is written several times with the same value.
        tl.store(logits + target, gradient.to(logits.dtype.element_ty), mask=known)


def loss_and_gradient(logits: Tensor, targets: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
    """Return the summed patch cross-entropy of logits[R, V], in nats per code, and the gradient in place of the logits.

    targets[R, k] are int64 codes. The loss is a float32 scalar; the gradient is computed in float32 and rounded once to
    the logits' dtype. Without `differentiate` the logits stay. They are contiguous and on a CUDA device, or on a CPU
    under TRITON_INTERPRET=1. A row that holds NaN, +inf or a code outside [0, V) has a loss and a gradient of NaN.
    """
    (rows, vocab), k = logits.shape, targets.shape[1]
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block, lanes = min(COLUMNS, triton.next_power_of_2(vocab)), triton.next_power_of_2(k)
    with torch.cuda.device_of(logits):
        patch_loss_kernel[(rows,)](
            logits, targets.contiguous(), losses, vocab, k, differentiate, block, lanes, num_warps=WARPS
        )
    return losses.sum(), logits
