"""The training step of the published code in eager PyTorch, on the weights of a `Transformer`.

It computes the same as `Transformer`: without dropout, the loss and all gradients are equal
(`tests/benchmarks/test_training_step_benchmark.py`). It computes them as the published code does (LlamaGen, arXiv
2406.06525, and Next Patch Prediction, arXiv 2412.15321):

- It looks up the embeddings of all codes and averages them over each patch.
- A norm is a sequence of float32 operations, and so is the rotation of q and of k.
- Keys and values are repeated for all heads, which copies them even if each head has its own.
- The float32 logits of all positions are repeated for each code of a patch; cross-entropy has one target per row.
- Gradients are clipped to norm 1. AdamW is fused on a GPU and PyTorch's default elsewhere, as in the published scripts.
"""

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npp_ds.model import Transformer
from npp_ds.model.transformer import Attention, FeedForward, RMSNorm, rotary_table


def split_into_patches(values: Tensor, patch_side: int) -> Tensor:
    """Reshape values[B, T, ...] of a square map in raster order to patches [B, N, k, ...]."""
    grid = isqrt(values.shape[1])
    coarse = grid // patch_side
    cut = values.unflatten(1, (coarse, patch_side, coarse, patch_side)).transpose(2, 3)
    return cut.flatten(3, 4).flatten(1, 2)


def patch_embeddings(table: Tensor, codes: Tensor, patch_side: int) -> Tensor:
    """Return the mean embedding [B, N, dim] of each patch of codes[B, T]."""
    return split_into_patches(F.embedding(codes, table), patch_side).mean(dim=2)


def norm(layer: RMSNorm, x: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(torch.mean(y * y, dim=-1, keepdim=True) + 1e-5)).type_as(x) * layer.weight


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x[B, N, H, D] by table[N, D/2, 2] of cosines and sines."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    table = table.view(1, pairs.shape[1], 1, pairs.shape[3], 2)
    first = pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1]
    second = pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1]
    return torch.stack([first, second], dim=-1).flatten(3).type_as(x)


def attention(layer: Attention, x: Tensor, rotary: Tensor) -> Tensor:
    batch, positions, dim = x.shape
    width = layer.kv_heads * layer.head_dim
    q, k, v = layer.wqkv(x).split([dim, width, width], dim=-1)
    q = q.view(batch, positions, layer.heads, layer.head_dim)
    k = k.view(batch, positions, layer.kv_heads, layer.head_dim)
    v = v.view(batch, positions, layer.kv_heads, layer.head_dim)
    q, k, v = (y.transpose(1, 2) for y in (rotate(q, rotary), rotate(k, rotary), v))
    k, v = (y.repeat_interleave(layer.heads // layer.kv_heads, dim=1) for y in (k, v))
    dropout = layer.attention_dropout if layer.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=True, dropout_p=dropout)
    out = out.transpose(1, 2).contiguous().view(batch, positions, dim)
    return layer.residual_dropout(layer.wo(out))


def feed_forward(layer: FeedForward, x: Tensor) -> Tensor:
    return layer.dropout(layer.w2(F.silu(layer.w1(x)) * layer.w3(x)))


def loss(model: Transformer, codes: Tensor, labels: Tensor, patch_side: int) -> Tensor:
    """Return the mean loss in nats per code for codes[B, T] in raster order and labels[B]."""
    grid = isqrt(codes.shape[1]) // patch_side
    rotary = rotary_table(grid, model.config.dim // model.config.n_heads, codes.device)
    patches = patch_embeddings(model.tok_embeddings.weight, codes, patch_side)
    x = torch.cat([model.cls_embedding(labels)[:, None], patches[:, :-1]], dim=1)
    x = model.token_dropout(x)
    for block in model.layers:
        x = x + attention(block.attention, norm(block.attention_norm, x), rotary)
        x = x + feed_forward(block.feed_forward, norm(block.ffn_norm, x))
    logits = F.linear(norm(model.norm, x), model.output.weight).float()
    targets = split_into_patches(codes, patch_side)
    logits = logits.repeat_interleave(targets.shape[2], dim=1)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def optimizer(groups: list[dict]) -> torch.optim.AdamW:
    """Return AdamW as the published scripts build it: fused on a GPU, PyTorch's loop over tensors on a CPU."""
    on_gpu = groups[0]["params"][0].is_cuda
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), **({"fused": True} if on_gpu else {}))


def update(model: nn.Module, adamw: torch.optim.Optimizer) -> None:
    """Do the part of a step that follows the backward pass: clip, update, and free the gradients."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adamw.step()
    adamw.zero_grad(set_to_none=True)
