"""The table of all benchmarks, and the code that runs one of them in a separate process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from npp_ds.errors import UserError

ROOT = Path(__file__).parent.parent
CORES = 2
PATIENCE = 3
"""The time limit of a benchmark, as a multiple of its expected minutes."""
SHOWN_LINES = 15
"""Last lines of a failed benchmark's output that are shown."""


@dataclass(frozen=True)
class Benchmark:
    """A module of this folder; expected minutes on two CPU cores, and with --gpu on one H100 (None: no GPU mode)."""

    name: str
    measures: str
    minutes: float
    gpu_minutes: float | None = None


BENCHMARKS = (
    Benchmark("patch_loss", "time and memory of the patch loss, against the published way", 5, gpu_minutes=2),
    Benchmark(
        "training_step", "a training step at each patch side, against the published way and the FLOPs", 5, gpu_minutes=3
    ),
    Benchmark("loader", "rows of codes per second, against WebDataset and files", 2),
    Benchmark("tokenize", "images to codes, against the published way", 5, gpu_minutes=4),
    Benchmark("sampling", "images sampled per second, against the published way", 4, gpu_minutes=4),
    Benchmark("engine", "a step of DeepSpeed's engine, against a bare loop", 6, gpu_minutes=3),
    Benchmark("saving", "how long a checkpoint pauses training, against DeepSpeed's own", 1),
    Benchmark("mfu", "whole steps in a bare loop and in the engine, compiled and with CUDA graphs", 4, gpu_minutes=8),
    Benchmark("attention", "kernels of causal attention for 4 to 576 positions", 2, gpu_minutes=2),
    Benchmark("network", "bytes that a step sends between nodes, against all-reduced gradients (as root)", 12),
    Benchmark("memory", "memory of a training process, measured and estimated", 4, gpu_minutes=6),
)


@dataclass(frozen=True)
class Outcome:
    """The outcome of one benchmark: its result and table, or the problem that ended it."""

    benchmark: Benchmark
    seconds: float
    result: dict | None = None
    table: str = ""
    problem: str = ""


def chosen(names: list[str] | None, gpu: bool) -> list[Benchmark]:
    """Return the benchmarks with these names, or all if None; with `gpu`, those with a GPU mode. Raises UserError."""
    known = {b.name: b for b in BENCHMARKS}
    if unknown := [name for name in names or () if name not in known]:
        raise UserError(f"--only {' '.join(unknown)}: no such benchmark; there are {', '.join(known)}")
    if gpu and (without := [name for name in names or () if known[name].gpu_minutes is None]):
        raise UserError(f"--only {' '.join(without)}: no --gpu mode; leave --gpu or the name out")
    return [b for b in BENCHMARKS if (b.name in names if names else not gpu or b.gpu_minutes is not None)]


def run(benchmark: Benchmark, gpu: bool = False, fast: bool = False, out: Path | None = None) -> Outcome:
    """Run a benchmark until it ends or reaches its time limit.

    Without `gpu`, it runs on `CORES` cores, for which the required minimums are stated, and sees no GPU. Its files are
    copied to `out` only if it succeeds.
    """
    limit = 60 * PATIENCE * (benchmark.gpu_minutes if gpu else benchmark.minutes)
    file = f"{benchmark.name}{'_gpu' if gpu else ''}"
    flags = [flag for flag, wanted in (("--gpu", gpu), ("--fast", fast)) if wanted]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"benchmarks.{benchmark.name}", *flags, "--out", folder]
        started = time.perf_counter()
        code, output = _run_to_end(command, limit, gpu)
        seconds = time.perf_counter() - started
        if code is None:
            return Outcome(benchmark, seconds, problem=f"ended after its time limit of {limit / 60:g} minutes{output}")
        if code:
            return Outcome(benchmark, seconds, problem=f"ended with code {code}{output}")
        figures, table = Path(folder) / f"{file}.json", Path(folder) / f"{file}.md"
        if not (figures.is_file() and table.is_file()):
            return Outcome(benchmark, seconds, problem=f"wrote no {file}.json and {file}.md")
        if out:
            out.mkdir(parents=True, exist_ok=True)
            for path in (figures, table):
                shutil.copyfile(path, out / path.name)
        return Outcome(benchmark, seconds, json.loads(figures.read_text()), table.read_text())


def _run_to_end(command: list[str], limit: float, gpu: bool) -> tuple[int | None, str]:
    """Return (exit code, None if it reached the limit in seconds; the last lines of its output). No process remains."""
    environment = dict(os.environ) if gpu else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    cores = sorted(os.sched_getaffinity(0))[: None if gpu else CORES]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
        log.seek(0)
        lines = log.read().splitlines()[-SHOWN_LINES:]
    return code, "".join(f"\n    {line}" for line in lines)


def end_group(process: subprocess.Popen) -> None:
    """Kill the process and all processes in its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
