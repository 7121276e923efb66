"""The LlamaGen decoder (arXiv 2406.06525) over patches of codes: feed-forward, block, head, model, in reading order.

Parameter names and shapes are those of the published checkpoints.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npp_ds.model.attention import Attention, KeyValueCache, rotary_table
from npp_ds.model.layers import Embedding, Linear, RMSNorm
from npp_ds.model.loss import patch_cross_entropy
from npp_ds.model.patches import PatchEmbedding
from npp_ds.model.recomputing import recomputing
from npp_ds.sizes import ffn_hidden


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a `Transformer`; `grid_size` is the code map's side at patch side 1. ValueError when they clash."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
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

    def __post_init__(self):
        if self.n_kv_heads is None:
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
        """The first half of a decoding step: query, key and value of one position."""
        return self.attention.rotated_qkv(self.attention_norm(x), rotary)

    def attend(self, x: Tensor, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
        """The second half, with key and value stored. Storing lies between the halves because compiled code that
        changes a cache and reads it copies all of it (torch 2.15).
        """
        x = x + self.attention.attend(q, keys, values, seen)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    """labels[B] in [0, num_classes] -> [B, dim]; the last row is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Head(nn.Module):
    """hidden[B, N, dim] -> logits[B, N, V] in float32, or with targets[B, N, k] their mean patch cross-entropy.

    Starts at zero, so that an untrained model gives every code the same probability and a loss of ln V. `loss_kernel`
    is `patch_cross_entropy`'s kernel.
    """

    loss_kernel = "torch"

    def __init__(self, dim: int, vocab_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab_size, dim))

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return F.linear(hidden, self.weight).float()
        return patch_cross_entropy(hidden, self.weight, targets, self.loss_kernel)


class Transformer(nn.Module):
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

    def forward(self, codes: Tensor, labels: Tensor, output: str = "loss") -> Tensor:
        """codes[B, N, k] int64 (N patches of k codes), labels[B] int64 -> mean loss in nats per code, a float32 scalar.

        With output="logits" the float32 logits [B, N, V], row i for patch i. Dropout alone tells train from eval mode.

        Raises ValueError when N is no square or larger than the model's grid.
        """
        if output not in ("loss", "logits"):
            raise ValueError(f"output {output!r} is neither 'loss' nor 'logits'")
        coarse_grid = isqrt(codes.shape[1])
        if coarse_grid**2 != codes.shape[1] or not 0 < coarse_grid <= self.config.grid_size:
            raise ValueError(
                f"{codes.shape[1]} patches do not fit a model of a {self.config.grid_size}x{self.config.grid_size} grid"
            )
        rotary = rotary_table(coarse_grid, self.config.dim // self.config.n_heads, codes.device)
        x = torch.cat([self.cls_embedding(labels)[:, None], self.tok_embeddings(codes[:, :-1])], dim=1)
        x = self.token_dropout(x)
        for layer in self.layers:
            x = recomputing(self.config.activation_checkpointing, layer, x, rotary)
        return self.output(self.norm(x), codes if output == "loss" else None)

    def new_cache(self, batch: int, grid: int, dtype: torch.dtype, device: torch.device | str) -> KeyValueCache:
        """A cache for `decode_step` on a `grid` x `grid` map: zeros, the rotations computed."""
        c = self.config
        shape = (batch, c.n_kv_heads, grid * grid, c.dim // c.n_heads)
        keys, values = ([torch.zeros(shape, dtype=dtype, device=device) for _ in self.layers] for _ in range(2))
        return KeyValueCache(keys, values, rotary_table(grid, c.dim // c.n_heads, device))

    def decode_step(
        self,
        inputs: Tensor,
        position: int | Tensor,
        cache: KeyValueCache,
        length: int | None = None,
        project: Callable[..., tuple[Tensor, Tensor, Tensor]] = Block.project,
        attend: Callable[..., Tensor] = Block.attend,
    ) -> Tensor:
        """Logits [B, V] in float32 for patch `position`, given all earlier calls on the first B rows of `cache`.

        inputs are labels[B] at position 0 and the codes [B, k] of patch `position - 1` after that. An integer position
        reads the filled part of the cache. An int64 tensor [1] reads its first `length` entries and masks those after
        the position: the same operations on the same memory for every position below `length`, so that they can be
        recorded once. `project` and `attend` are the block's halves, or compiled forms of them.
        """
        x = self.cls_embedding(inputs)[:, None] if inputs.ndim == 1 else self.tok_embeddings(inputs[:, None])
        if isinstance(position, int):
            at, seen, length = slice(position, position + 1), None, position + 1
        else:
            at, seen = position, torch.arange(length, device=position.device) <= position
        rotary = cache.rotary[at]
        x = x.clone()  # no view, like what comes between the layers: one compilation fits them all
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            keys, values = keys[: len(x), :, :length], values[: len(x), :, :length]
            q, k, v = project(layer, x, rotary)
            keys[:, :, at], values[:, :, at] = k.transpose(1, 2), v.transpose(1, 2)
            x = attend(layer, x, q, keys, values, seen)
        return self.output(self.norm(x))[:, 0]
