"""The expected memory of a training process is what PyTorch allocates, to within a tenth."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from npp_ds.config.schema import ModelSection
from npp_ds.model import ModelConfig, transformer
from npp_ds.model.transformer import Block, rotary_table
from npp_ds.planning.memory import block_bytes

ROOT = Path(__file__).parents[2]
MODEL = ModelSection(dim=256, n_layers=1, n_heads=4)
BATCH, GRID = 4, 16


def fused_attention(q, k, v, choice="auto", dropout=0.0):
    """The operation that SDPA takes on a GPU, which has a shape and a derivative without one too."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, True)[0].transpose(1, 2)


def saved_per_position(device: str, dtype: torch.dtype) -> float:
    """Bytes of the storages that a block's graph holds, weights and rotary table apart, per position."""
    torch.manual_seed(0)
    sizes = ModelConfig(**MODEL.arguments())
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            block = Block(sizes)
        finally:
            torch.set_default_dtype(torch.float32)
        x = torch.randn(BATCH, GRID**2, sizes.dim, dtype=dtype).requires_grad_()
    table = rotary_table(GRID, 64, device)
    own = {t.untyped_storage()._cdata for t in (*block.parameters(), table)}
    held = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own and tensor.numel() > table.numel():
            held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = block(x, table)
    del result
    return sum(t.untyped_storage().nbytes() for t in held.values()) / (BATCH * GRID**2)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_block_keeps_what_is_expected_on_a_cpu(precision, dtype):
    assert saved_per_position("cpu", dtype) == pytest.approx(block_bytes(MODEL, precision, "cpu"), rel=0.01)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a PyTorch that is built for CUDA")
@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_block_keeps_what_is_expected_on_a_gpu(precision, dtype, monkeypatch):
    """On stand-ins for a GPU's tensors, whose operations are chosen as on a GPU and hold no data."""
    monkeypatch.setattr(transformer, "causal_attention", fused_attention)
    with FakeTensorMode():
        found = saved_per_position("cuda", dtype)
    assert found == pytest.approx(block_bytes(MODEL, precision, "cuda"), rel=0.01)


def ratios(folder: Path, name: str, *arguments: str, timeout: float = 300) -> list[float]:
    """Expected over measured peak of the benchmark's cases."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.memory", "--fast", *arguments, "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    cases = json.loads((folder / f"{name}.json").read_text())["cases"]
    assert len(cases) == 3
    return [case["ratio"] for case in cases]


@pytest.mark.processes
def test_the_expected_peak_of_a_step_is_within_a_tenth_of_the_measured_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert ratios(tmp_path, "memory") == pytest.approx([1, 1, 1], abs=0.1)


@pytest.mark.gpu
@pytest.mark.processes
def test_the_expected_peak_of_b_is_within_a_tenth_of_what_a_gpu_allocates(tmp_path):
    assert ratios(tmp_path, "memory_gpu", "--gpu") == pytest.approx([1, 1, 1], abs=0.1)


def test_the_committed_measurements_are_all_within_a_tenth():
    cases = json.loads((ROOT / "benchmarks/results/memory.json").read_text())["cases"]
    assert {(case["zero_stage"], case["precision"]) for case in cases} >= {
        (stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "autocast_bf16")
    } | {(2, "bf16"), (3, "bf16")}
    assert {case["checkpointing"] for case in cases} == {"none", "selective", "block"}
    assert all(0.9 < case["ratio"] < 1.1 for case in cases), [case["ratio"] for case in cases]
