"""The LlamaGen decoder (arXiv 2406.06525) over patches of codes, from its layers to the whole model.

Parameter names and shapes equal those of the published checkpoints. Weights are drawn inside the constructors, because
DeepSpeed's `zero.Init` partitions a module as soon as it is built.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from npp_ds.model.attention import causal_attention, check_attention, masked_attention
from npp_ds.model.loss import patch_cross_entropy
from npp_ds.sizes import ffn_hidden
from npp_ds.utils.hub import HubModel


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a `Transformer`. Raises ValueError if sizes do not fit together.

    `grid_size` is the side of the code map; `n_kv_heads` 0 or None stands for n_heads. `coarse_positions` "paper"
    numbers the rows and columns of patches 0, 1, 2, ..; "centers" takes their centers in units of codes.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int = 0
    vocab_size: int = 16384
    grid_size: int = 16
    num_classes: int = 1000
    ffn_multiple_of: int = 256
    token_dropout: float = 0.0
    residual_dropout: float = 0.0
    ffn_dropout: float = 0.0
    attention_dropout: float = 0.0
    attention: str = "auto"
    activation_checkpointing: str = "none"
    coarse_positions: str = "paper"

    def __post_init__(self) -> None:
        if not self.n_kv_heads:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.dim % (4 * self.n_heads):
            raise ValueError(
                f"dim {self.dim} must be a multiple of 4 x n_heads = {4 * self.n_heads}: 2-D rotary positions need it"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")


def init_normal(weight: Tensor) -> None:
    """Fill `weight` from N(0, 0.02), generated in float32 on the CPU, then rounded to the dtype of `weight`.

    For one seed PyTorch generates other numbers on a GPU, and in bf16 other ones in each version, while DeepSpeed's
    `zero.Init` (0.19.8) allocates `weight` on the GPU and in the engine's precision. Beside `weight` itself this takes
    memory for one copy of it in float32 on the host.
    """
    if not weight.is_meta:  # there drawing would change nothing, and PyTorch would import its compiler for it
        weight.data = torch.empty_like(weight, dtype=torch.float32, device="cpu").normal_(std=0.02).to(weight)


class Linear(nn.Linear):
    """A projection without bias, drawn from N(0, 0.02)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        init_normal(self.weight)


class Embedding(nn.Embedding):
    """A table drawn from N(0, 0.02)."""

    def reset_parameters(self) -> None:
        init_normal(self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm, eps 1e-5, computed in float32; x[..., dim] -> the same shape."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=1e-5).type_as(x)


def mean_embedding(codes: Tensor, table: Tensor) -> Tensor:
    """Return the mean of the k token embeddings of each patch: codes[B, N, k], table[V, dim] -> [B, N, dim]."""
    return F.embedding_bag(codes.flatten(0, 1), table, mode="mean").unflatten(0, codes.shape[:2])


class PatchEmbedding(Embedding):
    """The patch embedding of NPP: `mean_embedding` with the token embedding as its only parameter."""

    def forward(self, codes: Tensor) -> Tensor:
        return mean_embedding(codes, self.weight)


class ClassEmbedding(nn.Module):
    """Embeds labels[B] in [0, num_classes] as [B, dim]; num_classes is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


def rotary_table(grid: int, head_dim: int, device: torch.device | str = "cpu", patch_side: int = 1) -> Tensor:
    """Return cos and sin of the RoPE angles as float32 [grid*grid, head_dim/2, 2]; row i is input position i.

    Row 0, the class position, is zero as in the published code, so q and k of that position are zero. Row i > 0 encodes
    patch i - 1: its grid row in the first half of the features, its grid column in the second (LlamaGen, base 10000).
    A grid row or column g counts as (g + 0.5) * patch_side - 0.5. With `patch_side` 1 this is g itself; with the side p
    of the patches it is the patch's center in units of codes.
    """
    quarter = head_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32, device=device) * 2 / (head_dim // 2))
    centers = (torch.arange(grid, dtype=torch.float32, device=device) + 0.5) * patch_side - 0.5
    angles = centers[:, None] * frequencies
    rows = angles[:, None, :].expand(grid, grid, quarter)
    columns = angles[None, :, :].expand(grid, grid, quarter)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros_like(table[:1]), table[:-1]])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x[B, N, H, D], neighbouring features as pairs, by table[N, D/2, 2]; computed in float32, in x's dtype.

    Eager code multiplies complex numbers, in one pass over x; products and sums of strided halves take eight. Inductor
    fuses the latter into one pass but has no kernels for complex numbers (torch 2.15).
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), table[:, None].unbind(-1)
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table)[:, None])
    return rotated.flatten(-2).type_as(x)


@dataclass
class KeyValueCache:
    """Keys and values of earlier positions, [B, G, positions, D] per layer, and the `rotary_table` of all positions."""

    keys: list[Tensor]
    values: list[Tensor]
    rotary: Tensor


class Attention(nn.Module):
    """Self-attention, x[B, N, dim] -> [B, N, dim]; with `n_kv_heads` < `n_heads`, query heads share keys and values."""

    def __init__(
        self, dim: int, n_heads: int, n_kv_heads: int, choice: str, attention_dropout: float, residual_dropout: float
    ):
        super().__init__()
        check_attention(choice)
        self.heads, self.kv_heads, self.head_dim = n_heads, n_kv_heads, dim // n_heads
        self.choice, self.attention_dropout = choice, attention_dropout
        self.wqkv = Linear(dim, (n_heads + 2 * n_kv_heads) * self.head_dim)
        self.wo = Linear(dim, dim)
        self.residual_dropout = nn.Dropout(residual_dropout)

    def rotated_qkv(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x[B, N, dim] to queries [B, N, H, D], keys and values [B, N, G, D]; queries and keys are rotated."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        return rotate(q, rotary), rotate(k, rotary), v

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        q, k, v = self.rotated_qkv(x, rotary)
        out = causal_attention(q, k, v, self.choice, self.attention_dropout if self.training else 0.0)
        return self.residual_dropout(self.wo(out.flatten(2)))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
        """Return the output [B, 1, dim] of one position with query q[B, 1, H, D] over keys and values[B, G, L, D].

        The boolean seen[L] marks the entries to attend to; None means all.
        """
        q = q.transpose(1, 2)
        if seen is None:
            out = F.scaled_dot_product_attention(q, keys, values, enable_gqa=self.heads != self.kv_heads)
        else:
            out = masked_attention(q, keys, values, seen)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU, x[B, N, dim] -> [B, N, dim]: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.w1 = Linear(dim, hidden)
        self.w3 = Linear(dim, hidden)
        self.w2 = Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream x[B, N, dim] -> [B, N, dim]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = Attention(
            config.dim,
            config.n_heads,
            config.n_kv_heads,
            config.attention,
            config.attention_dropout,
            config.residual_dropout,
        )
        self.feed_forward = FeedForward(config.dim, ffn_hidden(config.dim, config.ffn_multiple_of), config.ffn_dropout)
        self.attention_norm = RMSNorm(config.dim)
        self.ffn_norm = RMSNorm(config.dim)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.feed_forward(self.ffn_norm(x))

    def project(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value of one position, x[B, 1, dim]: the first half of a decoding step."""
        return self.attention.rotated_qkv(self.attention_norm(x), rotary)

    def attend(self, x: Tensor, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
        """Return the block's output [B, 1, dim]: the second half of a decoding step, after key and value are stored.

        The cache is written between the halves, because compiled code that writes and reads it copies it (torch 2.15).
        """
        x = x + self.attention.attend(q, keys, values, seen)
        return x + self.feed_forward(self.ffn_norm(x))


SAVED_BY_SELECTIVE = {
    "aten.mm.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "flash_attn._flash_attn_forward.default",
}
"""Operations whose results the mode `selective` saves: matrix products and attention, nearly all FLOPs of a block."""


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operation) in SAVED_BY_SELECTIVE else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(mode: str, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return block(*inputs), with the activations saved for the backward pass that `mode` names; it recomputes others.

    "none" saves all of them, "selective" the results of `SAVED_BY_SELECTIVE`, "block" only the block's inputs. Dropout
    masks are recomputed too, so results and gradients do not depend on the mode.
    """
    if mode == "none":
        return block(*inputs)
    if mode == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
    return checkpoint(block, *inputs, use_reentrant=False)


class Head(nn.Module):
    """Projects hidden[B, N, dim] to float32 logits [B, N, V], or given targets[B, N, k] to their mean cross-entropy.

    Initialized to zero, so an untrained model gives every code the same probability and has a loss of ln V.
    `loss_kernel` is the `kernel` of `patch_cross_entropy`.
    """

    loss_kernel = "torch"

    def __init__(self, dim: int, vocab_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab_size, dim))

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return F.linear(hidden, self.weight).float()
        return patch_cross_entropy(hidden, self.weight, targets, self.loss_kernel)


class Transformer(nn.Module, HubModel):
    """Predicts patch i of an image from its class and patches 0..i-1; with k = 1 this is next-token prediction."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.cls_embedding = ClassEmbedding(config.num_classes, config.dim)
        self.tok_embeddings = PatchEmbedding(config.vocab_size, config.dim)
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim)
        self.output = Head(config.dim, config.vocab_size)
        self.dropout_scale = 1.0

    def scale_dropout(self, scale: float) -> None:
        """Set all dropout rates to those of the config times `scale`."""
        self.dropout_scale = scale
        self.token_dropout.p = self.config.token_dropout * scale
        for layer in self.layers:
            assert isinstance(layer, Block)
            layer.attention.residual_dropout.p = self.config.residual_dropout * scale
            layer.attention.attention_dropout = self.config.attention_dropout * scale
            layer.feed_forward.dropout.p = self.config.ffn_dropout * scale

    def forward(self, codes: Tensor, labels: Tensor, output: str = "loss") -> Tensor:
        """Return the mean loss in nats per code, a float32 scalar, of int64 codes[B, N, k] and labels[B].

        With output="logits", return the float32 logits [B, N, V]; row i predicts patch i. Train and eval mode differ in
        dropout only. Raises ValueError unless N is a square of at most grid_size**2.
        """
        if output not in ("loss", "logits"):
            raise ValueError(f"output {output!r} is neither 'loss' nor 'logits'")
        coarse_grid = isqrt(codes.shape[1])
        if coarse_grid**2 != codes.shape[1] or not 0 < coarse_grid <= self.config.grid_size:
            raise ValueError(
                f"{codes.shape[1]} patches do not fit a model of a {self.config.grid_size}x{self.config.grid_size} grid"
            )
        rotary = self._rotary(coarse_grid, isqrt(codes.shape[2]), codes.device)
        x = torch.cat([self.cls_embedding(labels)[:, None], self.tok_embeddings(codes[:, :-1])], dim=1)
        x = self.token_dropout(x)
        for layer in self.layers:
            x = checkpointed(self.config.activation_checkpointing, layer, x, rotary)
        return self.output(self.norm(x), codes if output == "loss" else None)

    def _rotary(self, grid: int, patch_side: int, device: torch.device | str) -> Tensor:
        """Return the rotary table of a `grid` x `grid` map of patches."""
        unit = patch_side if self.config.coarse_positions == "centers" else 1
        return rotary_table(grid, self.config.dim // self.config.n_heads, device, unit)

    def new_cache(
        self, batch: int, grid: int, dtype: torch.dtype, device: torch.device | str, patch_side: int = 1
    ) -> KeyValueCache:
        """Return a cache of zeros for `decode_step` on a `grid` x `grid` map of patches."""
        c = self.config
        shape = (batch, c.n_kv_heads, grid * grid, c.dim // c.n_heads)
        keys, values = ([torch.zeros(shape, dtype=dtype, device=device) for _ in self.layers] for _ in range(2))
        return KeyValueCache(keys, values, self._rotary(grid, patch_side, device))

    def decode_step(
        self,
        inputs: Tensor,
        position: int | Tensor,
        cache: KeyValueCache,
        length: int | None = None,
        project: Callable[..., tuple[Tensor, Tensor, Tensor]] = Block.project,
        attend: Callable[..., Tensor] = Block.attend,
    ) -> Tensor:
        """Return the float32 logits [B, V] of patch `position`; the first B rows of `cache` hold the earlier positions.

        `inputs` are the labels[B] at position 0, else the codes [B, k] of patch `position - 1`. With an int position,
        the step reads the filled part of the cache. With an int64 tensor [1], it reads the first `length` entries and
        masks those after `position`: every position below `length` runs the same operations on the same memory, as a
        CUDA graph requires. `project` and `attend` are the methods of `Block`, or compiled forms of them.
        """
        x = self.cls_embedding(inputs)[:, None] if inputs.ndim == 1 else self.tok_embeddings(inputs[:, None])
        at: slice | Tensor
        if isinstance(position, int):
            at, seen, length = slice(position, position + 1), None, position + 1
        else:
            assert length is not None, "a position that is a tensor needs a length"
            at, seen = position, torch.arange(length, device=position.device) <= position
        rotary = cache.rotary[at]
        x = x.clone()  # not a view, like the outputs of layers, so that one compilation serves all layers
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            keys, values = keys[: len(x), :, :length], values[: len(x), :, :length]
            q, k, v = project(layer, x, rotary)
            keys[:, :, at], values[:, :, at] = k.transpose(1, 2), v.transpose(1, 2)
            x = attend(layer, x, q, keys, values, seen)
        return self.output(self.norm(x))[:, 0]
