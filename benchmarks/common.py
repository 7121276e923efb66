"""What all benchmarks share: their command line, measuring in turn, which machine it was, and where figures go."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

from npp_ds.utils.files import write_json_atomic, write_text_atomic

NO_GPU = "--gpu: PyTorch finds no CUDA device on this machine; run it where there is one, or leave --gpu out"


def machine(*packages: str, gpu: bool = False) -> dict[str, str | int | None]:
    """What figures depend on: processor, cores that were used, versions of `packages`, the first GPU where it was."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line]
    versions = {package: version(package) for package in packages}
    facts = {"processor": names[0] if names else platform.machine(), "cores": len(os.sched_getaffinity(0)), **versions}
    if gpu:
        facts["gpu"] = import_module("torch").cuda.get_device_name()
    return facts


def command_line(
    description: str, fast: str, gpu: str | None = None, repeats: int | None = None
) -> argparse.ArgumentParser:
    """An argument parser with the options of all benchmarks; `repeats` is the default of measured turns."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help=fast)
    if gpu:
        parser.add_argument("--gpu", action="store_true", help=gpu)
    if repeats:
        parser.add_argument("--repeats", type=int, default=repeats, help="measured turns (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the table (.md) and the figures (.json)")
    return parser


def parsed(parser: argparse.ArgumentParser, **modes: Mapping[str, Any]) -> argparse.Namespace:
    """The options; `modes` are other defaults for each of --fast and --gpu. --gpu without a GPU ends the program."""
    first = parser.parse_args()
    for mode, defaults in modes.items():
        if getattr(first, mode):
            parser.set_defaults(**defaults)
    options = parser.parse_args()
    if getattr(options, "gpu", False):
        require_gpu()
    return options


def require_gpu() -> None:
    """Ends the program with one line where there is no GPU."""
    if not import_module("torch").cuda.is_available():
        give_up(NO_GPU)


def give_up(error: str) -> NoReturn:
    """Ends the program as `npp` ends with what a person can mend: one text, exit code 2."""
    print(error, file=sys.stderr)
    sys.exit(2)


def waiting_for(gpu: bool) -> Callable[[], None]:
    """What waits until the device has done its work; on a CPU there is nothing to wait for."""
    return import_module("torch").cuda.synchronize if gpu else lambda: None


def seconds_each(work: Callable[[], Any], times: int, wait: Callable[[], None]) -> tuple[float, Any]:
    """(seconds of each of `times` calls in a row, what the last one returned); `wait` waits for the device."""
    wait()
    began = time.perf_counter()
    for _ in range(times):
        last = work()
    wait()
    return (time.perf_counter() - began) / times, last


def rates_in_turn(ways: Mapping[str, Callable[[], int]], repeats: int, gpu: bool = False) -> dict[str, list[float]]:
    """Things a second of each way, `repeats` times in turn (A B C, A B C, ..), after one unmeasured round.

    A way does its work and returns how many things it made; with `gpu` the clock stops when the GPU has made them.
    """
    wait = waiting_for(gpu)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, work in ways.items():
            started = time.perf_counter()
            count = work()
            wait()
            if turn:
                rates[name].append(count / (time.perf_counter() - started))
    return rates


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


def in_the_same_turn(ours: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The spread of ours / others, turn by turn: what slows a whole turn down cancels out."""
    return spread([a / b for a, b in zip(ours, others, strict=True)])


def where(facts: Mapping[str, Any]) -> str:
    """The machine of a result in words, without versions."""
    cores = f"{facts['cores']} core{'s' * (facts['cores'] > 1)}"
    return ", ".join([facts["processor"], cores, *([facts["gpu"]] if "gpu" in facts else [])])


def versions(facts: Mapping[str, Any]) -> str:
    """The rest of a machine's facts."""
    return ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("processor", "cores", "gpu"))


def made_by(result: Mapping[str, Any], how: str = "", options: str = "") -> str:
    """A table's last line: the machine, `how` it was used, and the command, with its `options`, that made the table."""
    facts, name = result["machine"], result["benchmark"]
    flags = [" --gpu"] * name.endswith("_gpu") + [" --fast"] * bool(result.get("fast"))
    command = f"python -m benchmarks.{name.removesuffix('_gpu')}{''.join(flags)}{options}"
    return f"{where(facts)}{f', {how}' if how else ''}; {versions(facts)}. Made by `{command}`."


def ratio_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(name, measured, wanted, verdict) of each ratio of a result. Larger is better; a ratio that is null was not
    measured."""
    rows = []
    for name, ratio in result.get("ratios", {}).items():
        wanted = result.get("wanted", {}).get(name)
        verdict = "" if wanted is None else "met" if ratio is not None and ratio >= wanted else "**not met**"
        measured = "not measured" if ratio is None else f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"
        rows.append((name, measured, "" if wanted is None else f"{wanted:g}", verdict))
    return rows


def bounds(result: Mapping[str, Any]) -> list[str]:
    """Lines of a table: each ratio of a result, beside what is wanted where a bound is named."""
    rows = ("| " + " | ".join(row) + " |" for row in ratio_rows(result))
    return ["| ratio | measured | wanted | |", "|---|---|---|---|", *rows]


def publish(result: dict, table: str, out: Path | None) -> None:
    """Prints the table and the result as one JSON line; with `out` also writes <benchmark>.md and .json there."""
    print(table)
    print(json.dumps(result))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_json_atomic(out / f"{result['benchmark']}.json", result)
        write_text_atomic(out / f"{result['benchmark']}.md", table)
