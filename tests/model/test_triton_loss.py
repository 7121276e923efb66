"""The Triton kernel of the patch loss, in Triton's interpreter on a CPU and, where there is one, on a GPU."""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context

import pytest
import torch
from test_loss import by_definition, problem, value_and_gradients

from npp_ds.model import ModelConfig, Transformer, patch_cross_entropy
from npp_ds.model import loss as loss_module
from npp_ds.training import performance as compiling
from runs import tiny_config

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton"),
]
VOCAB = 9001
"""Two blocks of the kernel's columns and a third that is not full."""
INF, NAN = float("inf"), float("nan")


def release(package: str) -> tuple[int, ...]:
    """Return (major, minor) of an installed package."""
    return tuple(map(int, version(package).split(".")[:2]))


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process with TRITON_INTERPRET=1, which Triton reads when it is imported."""
    if release("triton") < (3, 8) and release("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 fails with NumPy 2.4 and later, which refuse int() of arrays")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("TRITON_INTERPRET", "1")
            assert child.submit(os.getenv, "TRITON_INTERPRET").result(timeout=60) == "1"
        yield child


def in_triton(logits, targets, differentiate=True):
    """The loss, its gradient, and whether that stands in place of the logits."""
    from npp_ds.model.triton_loss import loss_and_gradient

    loss, gradient = loss_and_gradient(logits, targets, differentiate)
    return loss, gradient, gradient.data_ptr() == logits.data_ptr()


def in_chunks(hidden, weight, targets, autocast):
    """Loss and gradients with chunks of five rows."""
    loss_module.LOGITS_CHUNK_BYTES["cpu"] = 5 * 4 * len(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return value_and_gradients(partial(patch_cross_entropy, kernel="triton"), hidden, weight, targets)


def random_logits(k, dtype, rows=6, vocab=VOCAB):
    """Random logits and targets, not contiguous: one code k times in the first patch, one twice in the second."""
    g = torch.Generator().manual_seed(k)
    targets = torch.randint(vocab, (k, rows), generator=g).T
    targets[0], targets[1, -1] = targets[0, 0], targets[1, 0]
    return (3 * torch.randn(rows, vocab, generator=g)).to(dtype), targets


def in_float64(logits, targets):
    z = logits.double().requires_grad_()
    loss = (z.logsumexp(1) - z.gather(1, targets).mean(1)).sum()
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def check(loss, gradient, logits, targets):
    """Asserts that a loss, and every element of a gradient, agrees with float64."""
    exact_loss, exact = in_float64(logits, targets)
    rounding = 1e-5 if logits.dtype == torch.float32 else 2**-7  # Triton's interpreter (3.8) truncates to bf16
    assert gradient.dtype == logits.dtype
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), exact, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k", "vocab"), [(1, VOCAB), (4, VOCAB), (9, 300), (16, VOCAB), (64, VOCAB)])
def test_loss_and_gradient_of_logits_agree_with_float64(k, vocab, dtype, interpreter):
    logits, targets = random_logits(k, dtype, vocab=vocab)
    loss, gradient, in_place = interpreter.submit(in_triton, logits.clone(), targets).result(timeout=120)
    assert in_place
    check(loss, gradient, logits, targets)
    alone, unchanged, _ = interpreter.submit(in_triton, logits.clone(), targets, False).result(timeout=120)
    assert torch.equal(alone, loss) and torch.equal(unchanged, logits)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16 autocast"])
def test_loss_and_gradients_in_chunks_agree_with_float64(autocast, interpreter):
    hidden, weight, targets = problem(12, 4, VOCAB)
    expected = value_and_gradients(by_definition, hidden.double(), weight.double(), targets)
    found = interpreter.submit(in_chunks, hidden, weight, targets, autocast).result(timeout=120)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == torch.float32
        assert (f - e).norm() <= (2e-2 if autocast else 1e-5) * e.norm()


@pytest.mark.parametrize(
    ("columns", "value"),
    [
        (slice(6000, 6001), NAN),
        (slice(6000, 6001), INF),
        (slice(6000, 6001), -INF),
        (slice(0, 4096), -INF),  # the whole first block
        (slice(5, 6), -INF),  # a target
        (slice(None), -INF),
        (slice(None), NAN),
    ],
)
def test_logits_that_are_not_finite_give_what_pytorch_gives(columns, value, interpreter):
    logits = random_logits(2, torch.float32)[0][:1]
    logits[:, columns] = value
    targets = torch.tensor([[5, 7000]])
    expected = loss_module._loss_and_gradient(torch.empty_like(logits), logits, targets, True)
    loss, gradient, _ = interpreter.submit(in_triton, logits.clone(), targets).result(timeout=120)
    torch.testing.assert_close((loss, gradient), expected, equal_nan=True, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("code", [-1, VOCAB, -100])
def test_a_code_outside_the_vocabulary_is_not_ignored(code, interpreter):
    logits, targets = random_logits(4, torch.float32, rows=3)
    targets[1, 2] = code
    loss, gradient, _ = interpreter.submit(in_triton, logits.clone(), targets).result(timeout=120)
    assert loss.isnan()
    assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == [False, True, False]


def test_the_config_key_reaches_the_loss(shards, tmp_path, monkeypatch):
    from npp_ds.model import triton_loss

    called = []

    def stand_in(logits, targets, differentiate):
        called.append(tuple(targets.shape))
        return loss_module._loss_and_gradient(torch.empty_like(logits), logits, targets, differentiate)

    monkeypatch.setattr(triton_loss, "loss_and_gradient", stand_in)
    monkeypatch.setattr(compiling, "check_performance", lambda config: None)
    for kernel, expected in (("torch", []), ("triton", [(8, 4)])):
        config = tiny_config(shards, tmp_path, performance={"loss_kernel": kernel})
        model = Transformer(ModelConfig(**config.model.arguments()))
        compiling.apply_performance(model, config, torch.device("cpu"))
        model(torch.randint(1000, (2, 4, 4)), torch.tensor([3, 4])).backward()
        assert called == expected


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(ValueError, match="kernel 'cuda' is none of torch, triton"):
        patch_cross_entropy(*problem(2, 1), kernel="cuda")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernel_compiles_for_hopper_with_barriers_between_accesses_to_the_targets(dtype, monkeypatch, tmp_path):
    triton = pytest.importorskip("triton", minversion="3.3")  # ahead of time, older ones take other arguments
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from npp_ds.model.triton_loss import WARPS, patch_loss_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"DIFFERENTIATE": True, "BLOCK": 4096, "LANES": 16}
    types = {"logits": f"*{dtype}", "targets": "*i64", "losses": "*fp32", "vocab": "i32", "k": "i32"}
    source = ASTSource(patch_loss_kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
    assert compiled.asm["cubin"]
    order = " ".join(re.findall(r"\b(bar|st|atom|red)\.(?:sync|global)", compiled.asm["ptx"]))
    assert re.fullmatch("(bar )+st bar (st )+bar st", order)  # loss, probabilities, targets; no atomics
    assert dtype == "fp32" or "cvt.rn.bf16" in compiled.asm["ptx"]  # to nearest, as PyTorch rounds


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k", "vocab"), [(1, 16384), (4, VOCAB), (16, 16384), (64, VOCAB)])
def test_on_a_gpu_it_agrees_with_float64_and_repeats_its_bits(k, vocab, dtype):
    logits, targets = (x.cuda() for x in random_logits(k, dtype, rows=256, vocab=vocab))
    (loss, gradient, _), (again, same, _) = (in_triton(logits.clone(), targets) for _ in range(2))
    check(loss, gradient, logits, targets)
    assert torch.equal(loss, again) and torch.equal(gradient, same)
