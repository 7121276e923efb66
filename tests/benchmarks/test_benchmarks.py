"""The benchmarks run as they are documented and print figures of everything that they compare."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import engine, loader, tokenize
from benchmarks.own_processes import own_processes
from forks import run_forked

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]


def _results(name: str, out: Path, *arguments: str) -> tuple[dict, dict]:
    """(what a small run of a benchmark printed and wrote, what is committed)."""
    done = run_forked(f"benchmarks.{name}", *arguments, "--out", out, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((out / f"{name}.json").read_text()) == result
    return result, json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text())


def test_loader_benchmark_measures_every_reader(tmp_path):
    result, committed = _results("loader", tmp_path, "--images", "1024", "--subset", "512", "--repeats", "2")
    assert list(result["rows_per_second"]) == list(committed["rows_per_second"])
    table = (tmp_path / "loader.md").read_text()
    for name, rate in result["rows_per_second"].items():
        low, high = result["range"][name]
        assert 0 < low <= rate <= high
        assert f"| {name} | {rate:,} |" in table
    assert list(result["ratios"]) == ["loader_to_webdataset", "loader_to_files", "gather_to_webdataset"]
    (low, high), (other_low, other_high) = (result["range"][name] for name in (loader.LOADER[1], loader.FILES))
    assert low / other_high * 0.99 <= result["ratios"]["loader_to_files"] <= high / other_low * 1.01


def test_saving_benchmark_measures_every_way(tmp_path):
    result, committed = _results("saving", tmp_path, "--dim", "64", "--layers", "1", "--repeats", "1")
    assert list(result["seconds_stood_still"]) == list(committed["seconds_stood_still"])
    assert all(seconds > 0 for seconds in result["seconds_stood_still"].values())
    assert set(result["ratios"]) == {"at_once_to_deepspeed", "asynchronous_to_at_once"}
    assert all(ratio > 0 for ratio in result["ratios"].values())
    assert result["megabytes"]["npp_ds, at once"] == result["megabytes"]["npp_ds, asynchronous"] > 0


def test_tokenizing_benchmark_measures_both_ways(tmp_path):
    small = ["--images", "4", "--vq16-images", "4", "--repeats", "1", "--tokenizer", "fashion_mnist"]
    result, committed = _results("tokenize", tmp_path, *small)
    assert set(result["images_per_second"]) == set(committed["images_per_second"])
    assert (result["images"], result["repeats"], result["vq16"]["crops"]) == (4, 1, 4)
    rates, seconds = result["images_per_second"], result["vq16"]["seconds"]
    assert result["ratios"] == {
        "to_published": pytest.approx(rates[tokenize.HERE]["clock"] / rates[tokenize.PUBLISHED]["clock"], abs=1e-3),
        "to_published_in_processor_time": pytest.approx(
            rates[tokenize.HERE]["cpu"] / rates[tokenize.PUBLISHED]["cpu"], abs=1e-3
        ),
        "vq16_alone_to_pipeline": pytest.approx(
            seconds["alone"]["clock"] / seconds["in the pipeline"]["clock"], abs=1e-3
        ),
    }


@contextmanager
def _division(numerator: int) -> Iterator[Callable[[int], tuple[int, float]]]:
    yield lambda divisor: (os.getpid(), numerator / divisor)


def test_ways_work_in_processes_of_their_own_which_end_with_an_error_too():
    pids = []
    with (
        pytest.raises(RuntimeError, match="the process of two has ended"),
        own_processes(_division, {"one": (6,), "two": (8,)}) as ask,
    ):
        for way, order, expected in (("one", 2, 3.0), ("two", 2, 4.0), ("one", 3, 2.0)):
            pid, answer = ask(way, order)
            pids.append(pid)
            assert answer == expected
        ask("two", 0)
    assert len({*pids, os.getpid()}) == 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_engine_benchmark_measures_every_way_and_that_all_come_to_the_same_loss(run_benchmark, tmp_path, monkeypatch):
    small = {"dim": 32, "n_layers": 1, "n_heads": 1, "vocab_size": 512}
    monkeypatch.setattr(engine, "FAST", replace(engine.FAST, model=small, seconds=0.01))
    result = run_benchmark("engine", "--fast", "--repeats", "1", "--out", str(tmp_path))
    assert json.loads((tmp_path / "engine.json").read_text()) == result
    committed = json.loads((ROOT / "benchmarks/results/engine.json").read_text())
    assert set(result["ratios"]) == set(committed["ratios"])
    assert set(committed["wanted"]) <= set(committed["ratios"])
    for row in result["sides"]:
        milliseconds = {way: found["median"] for way, found in row["milliseconds"].items()}
        for way, rate in row["rate"].items():
            assert rate["median"] == pytest.approx(milliseconds["bare loop"] / milliseconds[way])
            ratio = f"{way.lower().replace('-', '')}_side_{row['patch_side']}"
            assert result["ratios"][ratio] == pytest.approx(rate["median"], abs=1e-3)


def test_engine_benchmark_refuses_ways_that_train_something_else(monkeypatch):
    answers = dict.fromkeys(engine.WAYS, (0.1, 9.0))
    monkeypatch.setattr(engine, "turns", lambda *_: iter([(1, {**answers, "ZeRO-3": (0.1, 9.001)})]))
    with pytest.raises(RuntimeError, match=r"side 1: ZeRO-3 has a loss of 9.001, the bare loop 9.0"):
        engine.run(engine.FAST, 1)
