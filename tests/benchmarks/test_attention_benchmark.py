"""The attention benchmark compares kernels that compute the same."""

import json

import torch

from benchmarks import attention as benchmark
from npp_ds.model.attention import causal_attention


def row(model, positions, kernel, seconds):
    return {"model": model, "positions": positions, "kernel": kernel, "seconds": {"median": seconds}}


def test_the_benchmark_runs_every_kernel_of_a_cpu_and_they_agree(tmp_path, capsys):
    threads = torch.get_num_threads()
    benchmark.main(["--fast", "--repeats", "2", "--threads", "1", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "attention.json").read_text()) == result
    done = [r for r in result["cases"] if "seconds" in r]
    assert {(r["kernel"], r["positions"]) for r in done} == {
        (kernel, positions) for kernel in ("sdpa", "sdpa_flash", "sdpa_math") for positions in (16, 64)
    }
    assert all(r["largest_difference"] < 1e-4 for r in done)
    failed = {r["kernel"]: r["failed"] for r in result["cases"] if "failed" in r}
    assert "a CUDA device" in failed["sdpa_cudnn"] and "not installed" in failed["flash_attn"]
    assert set(result["ratios"]) == {"small_16_fastest_over_sdpa", "small_64_fastest_over_sdpa"}
    assert all(ratio >= 1 for ratio in result["ratios"].values())
    text = (tmp_path / "attention.md").read_text()
    assert text.count("| small | 64 |") == 3 and "Not run: flash_attn (" in text


def test_a_kernel_that_fails_is_reported_and_the_others_are_measured(monkeypatch):
    def sometimes_broken(q, k, v, kernel):
        if kernel == "sdpa_math":
            raise RuntimeError("no image of the kernel")
        return causal_attention(q, k, v, kernel)

    monkeypatch.setattr(benchmark, "causal_attention", sometimes_broken)
    rows = {r["kernel"]: r for r in benchmark.measure(benchmark.Case("x", 2, 2, 16, "cpu", torch.float32), 2)}
    assert rows["sdpa_math"]["failed"] == "RuntimeError: no image of the kernel"
    assert rows["sdpa_flash"]["seconds"]["median"] > 0


def test_the_ratio_compares_pytorchs_choice_with_the_fastest_kernel_of_each_model():
    rows = [
        *(row("B", 16, k, s) for k, s in (("sdpa", 1.0), ("sdpa_flash", 1.0), ("sdpa_cudnn", 2.0), ("sdpa_math", 9))),
        *(row("XXL", 16, k, s) for k, s in (("sdpa", 20), ("sdpa_flash", 20), ("sdpa_cudnn", 10), ("sdpa_math", 90))),
        {"model": "B", "positions": 16, "kernel": "flash_attn", "failed": "not installed"},
    ]
    assert benchmark.ratios_of(rows) == {"B_16_fastest_over_sdpa": 1.0, "XXL_16_fastest_over_sdpa": 2.0}
