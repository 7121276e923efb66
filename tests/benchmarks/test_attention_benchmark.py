"""The attention benchmark compares kernels that compute the same, and turns its figures into what `auto` goes by."""

import json

import pytest
import torch

from benchmarks import attention as benchmark
from npp_ds.model import attention_kernels


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
    assert "a CUDA device" in failed["sdpa_cudnn"] and "not installed" in failed["flash_attn_4"]
    assert set(result["ratios"]) == {"small_16_fastest_over_sdpa", "small_64_fastest_over_sdpa"}
    assert all(ratio >= 1 for ratio in result["ratios"].values())
    text = (tmp_path / "attention.md").read_text()
    assert text.count("| small | 64 |") == 3 and "Not run: flash_attn (" in text


def test_a_kernel_that_fails_is_told_and_the_others_are_measured(monkeypatch):
    def broken(*inputs):
        raise RuntimeError("no image of the kernel")

    monkeypatch.setitem(benchmark.KERNELS, "sdpa_math", broken)
    rows = {r["kernel"]: r for r in benchmark.measure(benchmark.Case("x", 2, 2, 16, "cpu", torch.float32), 2)}
    assert rows["sdpa_math"]["failed"] == "RuntimeError: no image of the kernel"
    assert rows["sdpa_flash"]["seconds"]["median"] > 0


def test_kernels_are_ordered_by_their_times_relative_to_the_fastest_of_each_model():
    rows = [
        *(row("B", 16, k, s) for k, s in (("sdpa", 1.0), ("sdpa_flash", 1.0), ("sdpa_cudnn", 2.0), ("sdpa_math", 9))),
        *(row("XXL", 16, k, s) for k, s in (("sdpa", 20), ("sdpa_flash", 20), ("sdpa_cudnn", 10), ("sdpa_math", 90))),
        {"model": "B", "positions": 16, "kernel": "flash_attn", "failed": "not installed"},
    ]
    assert benchmark.order_of(rows) == {"16": ["sdpa_flash", "sdpa_cudnn", "sdpa_math"]}
    assert benchmark.ratios_of(rows) == {"B_16_fastest_over_sdpa": 1.0, "XXL_16_fastest_over_sdpa": 2.0}


@pytest.mark.parametrize("at_256, twin", [(0.2, "flash_attn_4"), (0.9, "sdpa_flash")])
def test_of_two_flash_kernels_that_exclude_each_other_the_one_that_saves_more_is_named(at_256, twin):
    rows = [row("B", 16, "sdpa_flash", 1.0), row("B", 16, "flash_attn_4", 1.5), row("B", 16, "sdpa_math", 3.0)]
    rows += [row("B", 256, "sdpa_flash", 1.0), row("B", 256, "flash_attn_4", at_256)]
    order = benchmark.order_of(rows)
    assert order == {"16": [twin, "sdpa_math"], "256": [twin]}


def test_what_is_written_is_what_auto_goes_by_and_other_gpus_stay(monkeypatch, tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"devices": {"8.0": {"gpu": "A", "torch": "2", "order": {"16": ["sdpa_math"]}}}}))
    benchmark.write_choice({"16": ["sdpa_cudnn"], "256": ["sdpa_flash"]}, path, "9.0", "H")
    monkeypatch.setattr(attention_kernels, "MEASURED", path)
    attention_kernels.measured_orders.cache_clear()
    orders = attention_kernels.measured_orders()
    attention_kernels.measured_orders.cache_clear()
    assert orders == {"8.0": {16: ["sdpa_math"]}, "9.0": {16: ["sdpa_cudnn"], 256: ["sdpa_flash"]}}
