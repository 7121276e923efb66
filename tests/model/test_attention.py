"""One choice of attention kernel, causal without a mask, with errors that say what is missing."""

import subprocess
import sys

import pytest
import torch

from npp_ds.config.schema import ModelSection
from npp_ds.errors import UserError
from npp_ds.model import attention
from npp_ds.model.attention import (
    ATTENTION_CHOICES,
    causal_attention,
    check_attention,
    chosen_kernel,
    missing_requirement,
)
from npp_ds.model.transformer import rotary_table, rotate


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


@pytest.mark.parametrize(
    "patch_side, centers", [(1, [0, 1, 2, 3]), (2, [0.5, 2.5, 4.5, 6.5]), (4, [1.5, 5.5, 9.5, 13.5])]
)
def test_rotary_positions_are_the_patch_centers_in_units_of_codes(patch_side, centers):
    frequencies = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    pairs = [(row, column) for row in centers for column in centers][:-1]
    angles = torch.stack([torch.cat([row * frequencies, column * frequencies]) for row, column in pairs])
    table = rotary_table(4, 16, patch_side=patch_side)
    assert table.shape == (16, 8, 2) and not table[0].any()
    expected = torch.stack([angles.cos(), angles.sin()], dim=-1)
    torch.testing.assert_close(table[1:].double(), expected, rtol=0, atol=1e-6)


@pytest.fixture
def hopper(monkeypatch):
    """Pretend a GPU of compute capability 9.0 with flash-attn; return kernel(choice, dtype, head_dim)."""
    monkeypatch.setattr(attention, "flash_attn_is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    missing_requirement.cache_clear()
    yield lambda choice, dtype=torch.bfloat16, head_dim=64: chosen_kernel(
        choice, torch.device("cuda"), dtype, 256, 12, 12, head_dim, False
    )
    missing_requirement.cache_clear()


@pytest.mark.parametrize("kernel", ["sdpa_flash", "sdpa_math"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_kernels_that_a_cpu_has_are_causal_attention_with_equal_gradients(kernel, kv_heads):
    if kernel == "sdpa_flash" and kv_heads < 4 and torch.__version__ < "2.11":
        pytest.skip("the flash kernel for CPUs of PyTorch 2.8 does not share key-value heads")
    q, k, v = (x.requires_grad_() for x in random_qkv(17, kv_heads=kv_heads))
    out = causal_attention(q, k, v, kernel)
    torch.testing.assert_close(out.double(), plain_attention(q, k, v), rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    expected = torch.autograd.grad(plain_attention(q, k, v).square().sum(), (q, k, v))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sdpa_is_asked_for_the_kernel_that_was_chosen():
    seen = []
    with torch.profiler.profile() as profiler:
        causal_attention(*random_qkv(17), "sdpa_math")
        causal_attention(*random_qkv(17), "sdpa_flash")
    seen = [e.key for e in profiler.key_averages() if "_scaled_dot_product" in e.key]
    assert {"aten::_scaled_dot_product_attention_math", "aten::_scaled_dot_product_flash_attention_for_cpu"} <= {*seen}


def test_the_config_knows_every_choice():
    assert ModelSection.model_fields["attention"].annotation.__args__ == ATTENTION_CHOICES


def test_asking_for_a_kernel_that_is_not_installed_says_what_to_do(monkeypatch):
    monkeypatch.setattr(attention, "flash_attn_is_installed", lambda: False)
    with pytest.raises(UserError, match="flash-attn is not installed; run `pip install flash-attn`, or set"):
        check_attention("flash_attn")
    for choice in set(ATTENTION_CHOICES) - {"flash_attn"}:
        check_attention(choice)
    with pytest.raises(UserError, match="'flash' is not one of auto, flash_attn, sdpa"):
        check_attention("flash")


@pytest.mark.parametrize(
    "kernel, needs",
    [
        ("flash_attn", "bf16 or fp16 on an Ampere GPU"),
        ("sdpa_cudnn", "a CUDA device"),
        ("sdpa_efficient", "a CUDA device"),
    ],
)
def test_asking_for_a_kernel_on_tensors_it_cannot_take_says_so(kernel, needs):
    with pytest.raises(UserError, match=f"{needs}.* found torch.float32 on cpu, head dimension 16; set precision"):
        causal_attention(*random_qkv(4), kernel)


def test_auto_is_flash_attn_where_it_can_run_and_else_sdpa(hopper, monkeypatch):
    assert hopper("auto") == hopper("flash_attn") == "flash_attn"
    assert hopper("auto", dtype=torch.float32) == hopper("auto", head_dim=20) == "sdpa"
    with pytest.raises(UserError, match=r"found torch\.float32 on cuda"):
        hopper("flash_attn", dtype=torch.float32)
    monkeypatch.setattr(attention, "flash_attn_is_installed", lambda: False)
    missing_requirement.cache_clear()
    assert hopper("auto") == "sdpa"
    q, k, v = random_qkv(5)
    assert torch.equal(causal_attention(q, k, v, "auto"), causal_attention(q, k, v, "sdpa"))


def test_choosing_a_kernel_does_not_load_the_compiler():
    code = "import sys, npp_ds.model; sys.exit(not {'torch._dynamo', 'triton'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "flash_attn"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("positions", [4, 16, 64, 144, 256, 576])
def test_kernels_of_a_gpu_equal_plain_attention_and_its_gradients(kernel, positions, kv_heads):
    try:
        check_attention(kernel)
    except UserError as error:
        pytest.skip(str(error))
    options = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (x.requires_grad_() for x in random_qkv(positions, kv_heads=kv_heads, dim=64, **options))
    try:
        out = causal_attention(q, k, v, kernel)
    except UserError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(out.double(), plain_attention(q, k, v), rtol=2e-2, atol=2e-2)
    found = torch.autograd.grad(out.float().sum(), (q, k, v))
    expected = torch.autograd.grad(plain_attention(q, k, v).sum(), (q, k, v))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=4e-2, atol=4e-2)
