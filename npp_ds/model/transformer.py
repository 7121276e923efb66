"""The LlamaGen decoder (arXiv 2406.06525) over patches of codes: feed-forward, block, head and model.

Parameter names and shapes equal those of the published checkpoints.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npp_ds.model.attention import Attention, KeyValueCache, rotary_table
from npp_ds.model.layers import Embedding, Linear, RMSNorm, checkpointed
from npp_ds.model.loss import patch_cross_entropy
from npp_ds.model.patches import PatchEmbedding
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


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.w1 = Linear(dim, hidden)
        self.w3 = Linear(dim, hidden)
        self.w2 = Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

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


class ClassEmbedding(nn.Module):
    """Embeds labels[B] in [0, num_classes] as [B, dim]; num_classes is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


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
