"""Shared code of the benchmarks: command line, timing in turns, facts about the machine, and output files."""

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
    """Return the processor, the number of cores, the versions of `packages`, and with `gpu` the first GPU's name."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line]
    versions = {package: version(package) for package in packages}
    facts = {"processor": names[0] if names else platform.machine(), "cores": len(os.sched_getaffinity(0)), **versions}
    if gpu:
        facts["gpu"] = import_module("torch").cuda.get_device_name()
    return facts


def command_line(
    description: str, fast: str, gpu: str | None = None, repeats: int | None = None
) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks; `repeats` is the default number of measured turns."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help=fast)
    if gpu:
        parser.add_argument("--gpu", action="store_true", help=gpu)
    if repeats:
        parser.add_argument("--repeats", type=int, default=repeats, help="measured turns (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the table (NAME.md) and the figures (NAME.json)")
    return parser


def parsed(parser: argparse.ArgumentParser, **modes: Mapping[str, Any]) -> argparse.Namespace:
    """Parse the command line; `modes` holds the defaults that --fast and --gpu replace.

    Ends the program with exit code 2 if --gpu is given and there is no GPU.
    """
    first = parser.parse_args()
    for mode, defaults in modes.items():
        if getattr(first, mode):
            parser.set_defaults(**defaults)
    options = parser.parse_args()
    if getattr(options, "gpu", False):
        require_gpu()
    return options


def require_gpu() -> None:
    """End the program with a one-line error if PyTorch finds no GPU."""
    if not import_module("torch").cuda.is_available():
        give_up(NO_GPU)


def give_up(error: str) -> NoReturn:
    """Print the error and end the program with exit code 2, as `npp` does for an error that the user can fix."""
    print(error, file=sys.stderr)
    sys.exit(2)


def waiting_for(gpu: bool) -> Callable[[], None]:
    """Return a function that waits until the GPU has finished its work, or does nothing on a CPU."""
    return import_module("torch").cuda.synchronize if gpu else lambda: None


def seconds_each(work: Callable[[], Any], times: int, wait: Callable[[], None]) -> tuple[float, Any]:
    """Return (mean seconds of `times` consecutive calls, the last call's result); `wait` waits for the device."""
    wait()
    began = time.perf_counter()
    for _ in range(times):
        last = work()
    wait()
    return (time.perf_counter() - began) / times, last


def rates_in_turn(ways: Mapping[str, Callable[[], int]], repeats: int, gpu: bool = False) -> dict[str, list[float]]:
    """Return the items per second of each way in each of `repeats` turns (A B C, A B C, ..), after an unmeasured one.

    A way does its work and returns the number of items it produced. With `gpu`, the clock stops when the GPU is done.
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
    """Return {"median", "lowest", "highest"} of the values."""
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


def in_the_same_turn(ours: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Return the spread of ours / others over turns. A slow turn slows both, so it hardly changes the ratio."""
    return spread([a / b for a, b in zip(ours, others, strict=True)])


def where(facts: Mapping[str, Any]) -> str:
    """Return the machine of a result as text, without versions."""
    cores = f"{facts['cores']} core{'s' * (facts['cores'] > 1)}"
    return ", ".join([facts["processor"], cores, *([facts["gpu"]] if "gpu" in facts else [])])


def versions(facts: Mapping[str, Any]) -> str:
    """Return the versions in a machine's facts as text."""
    return ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("processor", "cores", "gpu"))


def made_by(result: Mapping[str, Any], how: str = "", options: str = "") -> str:
    """Return a table's last line: the machine, `how` it was used, and the command with its `options`."""
    facts, name = result["machine"], result["benchmark"]
    flags = [" --gpu"] * name.endswith("_gpu") + [" --fast"] * bool(result.get("fast"))
    command = f"python -m benchmarks.{name.removesuffix('_gpu')}{''.join(flags)}{options}"
    return f"{where(facts)}{f', {how}' if how else ''}; {versions(facts)}. Made by `{command}`."


def ratio_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return (name, measured value, required minimum, verdict) of each ratio of a result.

    Larger is better. A ratio that is None was not measured.
    """
    rows = []
    for name, ratio in result.get("ratios", {}).items():
        wanted = result.get("wanted", {}).get(name)
        verdict = "" if wanted is None else "met" if ratio is not None and ratio >= wanted else "**not met**"
        measured = "not measured" if ratio is None else f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"
        rows.append((name, measured, "" if wanted is None else f"{wanted:g}", verdict))
    return rows


def bounds(result: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table with each ratio of a result and its required minimum, if it has one."""
    rows = ("| " + " | ".join(row) + " |" for row in ratio_rows(result))
    return ["| ratio | measured | required | |", "|---|---|---|---|", *rows]


def publish(result: dict, table: str, out: Path | None) -> None:
    """Print the table and the result as one JSON line. With `out`, also write <benchmark>.md and .json there."""
    print(table)
    print(json.dumps(result))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_json_atomic(out / f"{result['benchmark']}.json", result)
        write_text_atomic(out / f"{result['benchmark']}.md", table)
