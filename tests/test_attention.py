"""One choice of attention kernel, causal without a mask, with errors that say what is missing."""

import pytest
import torch

from npp_ds.errors import UserError
from npp_ds.model import attention
from npp_ds.model.attention import causal_attention, check_attention, rotary_table, rotate


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over positions 0..i in float64; [B, N, H, D]."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def random_qkv(positions: int, heads: int = 4, kv_heads: int = 4, dim: int = 16, **options):
    g = torch.Generator().manual_seed(positions)
    return [torch.randn(2, positions, h, dim, generator=g).to(**options) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("positions", [1, 4, 17, 64])
def test_sdpa_is_causal_attention(positions, kv_heads):
    q, k, v = random_qkv(positions, kv_heads=kv_heads)
    torch.testing.assert_close(
        causal_attention(q, k, v, "sdpa").double(), plain_attention(q, k, v), rtol=1e-5, atol=1e-6
    )


def by_rotation_matrices(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Each pair of neighbouring features times [[cos, -sin], [sin, cos]], in float64."""
    cos, sin = table.double().unbind(-1)
    matrices = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    return torch.einsum("npij,bnhpj->bnhpi", matrices, x.double().unflatten(-1, (-1, 2))).flatten(-2)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rotation_and_its_gradient_are_those_of_rotation_matrices(monkeypatch, compiling, dtype, tolerance):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    qkv, upstream = torch.randn(2, 16, 12, 16).to(dtype).requires_grad_(), torch.randn(2, 16, 4, 16).to(dtype)
    k, table = qkv.split(4, dim=2)[1], rotary_table(4, 16)
    found, expected = rotate(k, table), by_rotation_matrices(k, table)
    assert found.dtype == dtype and not found[:, 0].any() and found[:, 1:].any(dim=-1).all()
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(y, qkv, g)[0] for y, g in ((found, upstream), (expected, upstream.double()))]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def test_asking_for_flash_attn_where_it_is_not_installed_says_what_to_do(monkeypatch):
    monkeypatch.setattr(attention, "flash_attn_importable", lambda: False)
    with pytest.raises(UserError, match="flash-attn is not installed; run `pip install flash-attn`"):
        check_attention("flash_attn")
    for choice in ("auto", "sdpa"):
        check_attention(choice)
    with pytest.raises(UserError, match="'flash' is not one of auto, flash_attn, sdpa"):
        check_attention("flash")


def test_asking_for_flash_attn_on_tensors_it_cannot_take_says_so():
    with pytest.raises(UserError, match=r"found torch\.float32 on cpu, head width 16; set precision"):
        causal_attention(*random_qkv(4), "flash_attn")


def test_auto_uses_flash_attn_only_where_it_applies(monkeypatch):
    monkeypatch.setattr(attention, "flash_attn_importable", lambda: True)
    q, k, v = random_qkv(5)
    assert torch.equal(causal_attention(q, k, v, "auto"), causal_attention(q, k, v, "sdpa"))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("positions", [4, 16, 64, 256, 576])
def test_flash_kernels_on_a_gpu_equal_plain_attention(positions, kv_heads):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = random_qkv(positions, kv_heads=kv_heads, dim=64, device="cuda", dtype=torch.bfloat16)
    expected = plain_attention(q, k, v)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.testing.assert_close(causal_attention(q, k, v, "sdpa").double(), expected, rtol=2e-2, atol=2e-2)
    if attention.flash_attn_importable():
        torch.testing.assert_close(causal_attention(q, k, v, "flash_attn").double(), expected, rtol=2e-2, atol=2e-2)
