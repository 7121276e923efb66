"""Estimate the device memory of one training process from the config alone. Needs no torch.

Activations are counted tensor by tensor and the memory of DeepSpeed (0.19) buffer by buffer; `python -m
benchmarks.memory` measures both. `docs/planning.md` derives the formulas.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from npp_ds.config.schema import ModelSection, RunConfig
from npp_ds.sizes import LOGITS_CHUNK_BYTES, block_parameters, ffn_hidden, num_positions

FP32 = 4
MAX_LIVE = 1_000_000_000
"""DeepSpeed's default of stage3_max_live_parameters: the most gathered parameters that ZeRO-3 keeps at once."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device: the maximum of each part over a step, and `peak`, the maximum of their sum.

    Activations are freed while gradients are produced, so the peak is below the sum of the parts.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    logits: int
    buffers: int
    peak: int


PARTS = tuple(f.name for f in fields(Memory) if f.name != "peak")


def training_memory(
    config: RunConfig,
    zero: Mapping[str, Any],
    world_size: int,
    micro_batch_size: int,
    patch_side: int,
    accumulates: bool = False,
    device: str = "cuda",
) -> Memory:
    """Return the memory of a step on one of `world_size` processes, with DeepSpeed's section `zero_optimization`.

    `accumulates` is True if a step has more than one micro-batch. The CUDA context, NCCL's buffers and fragmentation
    are not counted; offloading is ignored.
    """
    rows = micro_batch_size * num_positions(config.model.grid_size, patch_side)
    share = -(-config.model.parameters() // world_size)
    optimizer, ema = 3 * FP32 * share, FP32 * share if config.optimizer.ema_decay else 0
    kept = activations(config, rows, device, keeps_casts=zero["stage"] != 3)
    head, logits, scaled = _head(config, rows, device)
    partitioning = {1: _zero1, 2: _zero2, 3: _zero3}[zero["stage"]]
    held = partitioning(config, zero, world_size, accumulates, kept.backward)
    moments = [
        held.before + kept.forward + head + logits,
        held.before + kept.backward + head + scaled + held.staging,
        held.before + kept.backward + kept.block + held.staging,
        held.late + kept.block + held.staging,
        *held.later,
    ]
    peak = held.always + optimizer + ema + max(moments)
    most = max(kept.forward, kept.backward + kept.block)
    return Memory(held.weights, held.gradients, optimizer, ema, most, head + logits, held.buffers, peak)


@dataclass(frozen=True)
class _Partitioned:
    """Bytes of weights and gradients under a ZeRO stage, and when they are allocated.

    `always`: also between steps; `before`: from before the forward pass on; `staging`: buffers from the first gradient
    on; `late`: gradients while the first block is recomputed, which is the last one to be; `later`: everything but
    `always` at moments with few activations left.
    """

    weights: int
    gradients: int
    buffers: int
    always: int
    before: int
    staging: int
    late: int
    later: list[int]


def _sizes(config: RunConfig, zero: Mapping[str, Any], world_size: int) -> tuple[int, int, int, int]:
    """Return the bytes of all weights, of this process's float32 gradients, of a bucket, and of its float32 copy."""
    count, stored = config.model.parameters(), weight_bytes(config.precision)
    bucket = zero.get("reduce_bucket_size", 500_000_000)
    return stored * count, FP32 * -(-count // world_size), stored * bucket, FP32 * min(bucket, count)


def _zero1(
    config: RunConfig, zero: Mapping[str, Any], world_size: int, accumulates: bool, activations: int
) -> _Partitioned:
    """ZeRO-1: all gradients exist until the last micro-batch is done; then this process's are copied twice."""
    weights, own, bucket, sent = _sizes(config, zero, world_size)
    before, staging = (weights + bucket, 0) if accumulates else (0, bucket)
    model, dim = config.model, config.model.shape()["dim"]
    tables = weight_bytes(config.precision) * dim * (model.vocab_size + model.num_classes + 1)
    late = max(before, weights - tables)
    later = [weights + own, weights + bucket, bucket + sent + own, 2 * own]
    return _Partitioned(weights, weights + own, bucket + sent, weights, before, staging, late, later)


def _zero2(
    config: RunConfig, zero: Mapping[str, Any], world_size: int, accumulates: bool, activations: int
) -> _Partitioned:
    """ZeRO-2: gradients pass through buckets into this process's partition.

    With float32 weights the partition fills as buckets are reduced, and is summed over micro-batches. With bf16 it is
    allocated in float32 from the first bucket on, and the norm of the largest tensor is taken in float64.
    """
    weights, own, bucket, sent = _sizes(config, zero, world_size)
    staging = bucket * (2 if zero.get("overlap_comm", False) else 1)
    before = own if accumulates else 0
    if weight_bytes(config.precision) == FP32:
        gradients, later = own + before, [own + before + staging + sent, 2 * own]
    else:
        count, largest = config.model.parameters(), config.model.vocab_size * config.model.shape()["dim"]
        left = activations * (FP32 * count - sent) // (FP32 * count)
        gradients, later = own, [own + staging + sent + left, own + 2 * FP32 * largest]
    return _Partitioned(weights, gradients, staging + sent, weights, before, staging, gradients, later)


def _zero3(
    config: RunConfig, zero: Mapping[str, Any], world_size: int, accumulates: bool, activations: int
) -> _Partitioned:
    """ZeRO-3: weights are gathered in the forward pass and kept, up to a limit, for the backward pass."""
    weights, own, bucket, sent = _sizes(config, zero, world_size)
    part, live = -(-weights // world_size), zero.get("stage3_max_live_parameters", MAX_LIVE)
    gathered = min(weights, weight_bytes(config.precision) * live) if world_size > 1 else 0
    return _Partitioned(part + gathered, own, bucket + sent, part + own + bucket, gathered, sent, 0, [own])


@dataclass(frozen=True)
class Activations:
    """Bytes kept for the backward pass, without the head: when the forward pass ends, when the backward pass begins,
    and in addition while the backward pass recomputes a block."""

    forward: int
    backward: int
    block: int


def activations(config: RunConfig, rows: int, device: str, keeps_casts: bool = True) -> Activations:
    """Return what the blocks and the final norm keep for `rows` positions.

    Under autocast a bf16 copy of each matrix lives to the end of the forward pass, and longer if the graph needs it.
    Under ZeRO-3 measurements show no copies, presumably because DeepSpeed's own linear layer casts again.
    """
    model = config.model
    stored, computed = _widths(config.precision)
    dim, layers = model.shape()["dim"], model.shape()["n_layers"]
    mask = _mask(stored, device) * dim if model.token_dropout else 0
    around = rows * (_norm(dim, device) + mask)
    block, inputs = rows * block_bytes(model, config.precision, device), rows * stored * dim
    cast = block_parameters(dim, model.shape()["n_heads"], model.n_kv_heads, model.ffn_multiple_of)
    cast = computed * cast if stored != computed and keeps_casts else 0
    if model.activation_checkpointing == "none":
        kept = around + layers * (block + cast)
        return Activations(kept, kept, 0)
    products = rows * products_bytes(model, config.precision) if model.activation_checkpointing == "selective" else 0
    kept = around + layers * (inputs + products)
    return Activations(kept + layers * cast, kept, block - products + cast + inputs)


def block_bytes(model: ModelSection, precision: str, device: str) -> int:
    """Return the bytes per position that one block keeps for its backward pass.

    The norms keep their input in float32 (on a CPU also the normalised input) and its root mean square; attention keeps
    its input, the projected q, k and v, the rotated q and k, its output and a logsumexp per head; the feed-forward
    layer keeps its input (under autocast two casts of it), both projections, the activation and the product; dropout
    keeps its mask.
    """
    stored, computed = _widths(precision)
    dim, heads, kv_dim, hidden = _shape(model)
    attention = computed * (dim + (dim + 2 * kv_dim) + (dim + kv_dim) + dim) + FP32 * heads
    inputs = 2 if stored != computed else 1
    feed_forward = computed * (inputs * dim + 4 * hidden)
    masks = sum(_mask(computed, device) * dim for p in (model.residual_dropout, model.ffn_dropout) if p)
    return 2 * _norm(dim, device) + attention + feed_forward + masks


def products_bytes(model: ModelSection, precision: str) -> int:
    """Return the bytes per position that `selective` checkpointing keeps of one block: all products and attention."""
    _, computed = _widths(precision)
    dim, heads, kv_dim, hidden = _shape(model)
    return computed * ((dim + 2 * kv_dim) + dim + dim + 2 * hidden + dim) + FP32 * heads


def _shape(model: ModelSection) -> tuple[int, int, int, int]:
    """Return (width, heads, width of all keys, width of the feed-forward layer)."""
    dim, heads = model.shape()["dim"], model.shape()["n_heads"]
    return dim, heads, (model.n_kv_heads or heads) * (dim // heads), ffn_hidden(dim, model.ffn_multiple_of)


def weight_bytes(precision: str) -> int:
    """Return the bytes of a weight as it is stored and sent."""
    return _widths(precision)[0]


def _widths(precision: str) -> tuple[int, int]:
    """Return the bytes of a weight as it is stored, and as matrix products use it."""
    return {"fp32": (4, 4), "autocast_bf16": (4, 2), "bf16": (2, 2)}[precision]


def _norm(dim: int, device: str) -> int:
    """Return the bytes per position that a norm keeps."""
    return FP32 * (dim * (2 if device == "cpu" else 1) + 1)


def _mask(width: int, device: str) -> int:
    """Return the bytes per element of a dropout mask: one on a GPU; on a CPU the mask has the dtype of its input."""
    return width if device == "cpu" else 1


def _head(config: RunConfig, rows: int, device: str) -> tuple[int, int, int]:
    """Return the bytes of the head's gradients, which its forward pass computes; of its working memory in that pass;
    and of the copy of the weight's gradient that its backward pass makes if weights are not float32."""
    stored, computed = _widths(config.precision)
    dim, vocab = config.model.shape()["dim"], config.model.vocab_size
    hidden, weight, logits = rows * stored * dim, vocab * dim, rows * FP32 * vocab
    chunk = min(logits, LOGITS_CHUNK_BYTES[device])
    working = 2 * chunk  # a chunk's logits and their softmax
    if computed != FP32:  # logits in bf16, cast for the softmax; then a product, which a CPU casts before adding
        product = computed * weight + (FP32 * weight if device == "cpu" else 0)
        working = chunk + chunk // 2 + max(chunk, product)
    copy = computed * weight if stored != computed else 0
    scaled = stored * weight if stored != FP32 else 0
    return FP32 * weight + hidden, working + copy + hidden, scaled
