"""What the benchmark of the patch loss compares computes the same, and it runs as it is documented."""

import json

import pytest
import torch

from benchmarks import patch_loss as benchmark

SMALL = [benchmark.Case("w32", 32, k, 48, vocab=200) for k in (1, 16)]


@pytest.mark.parametrize("case", SMALL, ids=["next token", "16 codes"])
def test_every_way_has_the_same_loss_and_gradients(case):
    hidden, weight, targets = case.problem()
    found = {}
    for name, loss in case.ways().items():
        value = benchmark.forward_and_backward(loss, hidden, weight, targets)
        found[name] = value, hidden.grad, weight.grad
    ways = {benchmark.HERE, benchmark.PUBLISHED, benchmark.WHOLE, benchmark.LINEAR}
    assert set(found) == ways | ({benchmark.PLAIN} if case.k == 1 else set())
    for tensors in found.values():
        for tensor, ours in zip(tensors, found[benchmark.HERE], strict=True):
            assert ours.norm() > 0 and (tensor - ours).norm() <= 1e-5 * ours.norm()


def test_the_triton_kernel_is_compared_on_a_gpu_where_triton_is_installed(monkeypatch):
    case = benchmark.Case("w32", 32, 4, 48, device="cuda")
    for installed in (True, False):
        monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: installed or None)  # noqa: B023
        assert (benchmark.TRITON in case.ways()) == installed
    assert benchmark.TRITON not in SMALL[0].ways()


def test_memory_is_the_largest_sum_of_what_was_allocated_at_one_time():
    case = SMALL[1]
    logits = 4 * case.positions * case.vocab
    published = benchmark.peak_bytes(benchmark.published, *case.problem())
    whole = benchmark.peak_bytes(benchmark.whole, *case.problem())
    assert 3 * case.k * logits <= published <= (3 * case.k + 3) * logits  # repeated logits, log-softmax, its gradient
    assert 2 * logits <= whole <= 6 * logits


def test_it_prints_every_way_and_whether_the_bounds_are_met(tmp_path, monkeypatch, capsys):
    cases = [benchmark.Case(name, 32, k, 48, vocab=200) for name in ("w256", "w768") for k in (1, 16)]
    monkeypatch.setattr(benchmark, "cpu_cases", lambda fast: cases)
    monkeypatch.setattr("sys.argv", ["patch_loss", "--repeats", "2", "--threads", "1", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(threads)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "patch_loss.json").read_text())
    assert result["wanted"] == benchmark.CPU_WANTED and result["wanted"].keys() <= result["ratios"].keys()
    assert all(ratio > 0 for ratio in result["ratios"].values())
    text = (tmp_path / "patch_loss.md").read_text()
    for case in result["cases"]:
        for name, figures in case["ways"].items():
            assert 0 < figures["lowest"] <= figures["median"] <= figures["highest"]
            assert f"| {name} | {figures['median'] * 1e3:,.1f} |" in text
    for name, bound in result["wanted"].items():
        found = result["ratios"][name]
        assert f"({name}) | {bound} | {found} | {'yes' if found >= bound else 'no'} |" in text


def test_the_cases_are_those_that_are_wanted():
    cases = benchmark.cpu_cases(fast=False)
    assert {(c.width, c.k, c.positions, c.vocab) for c in cases} == {
        (d, k, 512 if k == 64 else 2048, 16384) for d in (256, 768) for k in (1, 4, 16, 64)
    }
    for case in benchmark.gpu_cases(fast=False):
        assert case.positions * case.passes * case.k == 65536
