"""Causal self-attention with 2-D rotary positions on the patch grid, and a key-value cache."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npp_ds.model.attention_kernels import causal_attention, check_attention
from npp_ds.model.layers import Linear


def rotary_table(grid: int, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """cos and sin of the rotations, float32 [grid*grid, head_dim/2, 2], row i for input position i.

    Row 0, the class position, is all zeros: the published code makes q and k of that position zero. Row i > 0 carries
    the position of patch i - 1, whose row rotates the first half of the frequencies and whose column the second
    (LlamaGen, base 10000).
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
    """x[B, N, H, D] with neighbouring features as pairs, table[N, D/2, 2] -> x rotated in float32, in x's dtype.

    A rotation is a product of complex numbers: one pass over x, where products and sums of every second feature take
    eight slow ones. A compiler makes one pass of those, and none of complex numbers (torch 2.15).
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), table[:, None].unbind(-1)
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table)[:, None])
    return rotated.flatten(-2).type_as(x)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q[B, H, 1, D] attends to those of k and v[B, G, L, D] where seen[L] is true -> [B, H, 1, D], sums in float32.

    Products and sums instead of a kernel for matrices: with one query a compiler reads every key and value once, at the
    speed of memory, while tiles would be mostly padding. Entries not seen must be finite.
    """
    query = q.float().unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5
    scores = (query * k.float()[:, :, None]).sum(-1)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights.unsqueeze(-1) * v.float()[:, :, None]).sum(-2).flatten(1, 2).unsqueeze(2).type_as(q)


@dataclass
class KeyValueCache:
    """What decoding steps share: per layer the keys and values so far, [B, G, positions, D] each, and the rotations of
    all positions, float32 [positions, D/2, 2].
    """

    keys: list[Tensor]
    values: list[Tensor]
    rotary: Tensor


class Attention(nn.Module):
    """x[B, N, dim] -> [B, N, dim]; `n_kv_heads` < `n_heads` shares keys and values between groups of query heads."""

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
        """x[B, N, dim] -> queries [B, N, H, D], keys and values [B, N, G, D]."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        return rotate(q, rotary), rotate(k, rotary), v

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        q, k, v = self.rotated_qkv(x, rotary)
        out = causal_attention(q, k, v, self.choice, self.attention_dropout if self.training else 0.0)
        return self.residual_dropout(self.wo(out.flatten(2)))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
        """q[B, 1, H, D] of one position to keys and values[B, G, L, D], all of them or those that seen[L] marks."""
        q = q.transpose(1, 2)
        if seen is None:
            out = F.scaled_dot_product_attention(q, keys, values, enable_gqa=self.heads != self.kv_heads)
        else:
            out = masked_attention(q, keys, values, seen)
        return self.wo(out.transpose(1, 2).flatten(2))
