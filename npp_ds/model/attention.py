"""Causal self-attention with 2-D rotary position embeddings (RoPE) on the patch grid, and the key-value cache."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npp_ds.model.attention_kernels import causal_attention, check_attention
from npp_ds.model.layers import Linear


def rotary_table(grid: int, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Return cos and sin of the RoPE angles as float32 [grid*grid, head_dim/2, 2]; row i is input position i.

    Row 0, the class position, is zero as in the published code, so q and k of that position are zero. Row i > 0 encodes
    patch i - 1: its grid row in the first half of the features, its grid column in the second (LlamaGen, base 10000).
    """
    quarter = head_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32, device=device) * 2 / (head_dim // 2))
    angles = torch.arange(grid, dtype=torch.float32, device=device)[:, None] * frequencies
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


def masked_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Return attention [B, H, 1, D] of q[B, H, 1, D] to the entries of k and v[B, G, L, D] where seen[L] is true.

    Sums are float32. These are products and sums instead of matrix products: with a single query, compiled code reads
    every key and value once at memory bandwidth, while tiles of a matrix kernel would be mostly padding. Entries that
    are not seen must be finite.
    """
    query = q.float().unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5
    scores = (query * k.float()[:, :, None]).sum(-1)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights.unsqueeze(-1) * v.float()[:, :, None]).sum(-2).flatten(1, 2).unsqueeze(2).type_as(q)


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
