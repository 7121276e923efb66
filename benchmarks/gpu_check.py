"""Check and measure everything on one GPU within minutes: correctness first, then the most valuable figures.

    python -m benchmarks.gpu_check                         # first call, at most 6 minutes
    python -m benchmarks.gpu_check --limit 260             # resumes with the parts that have not passed
    python -m benchmarks.gpu_check --only "steps B" zero2  # these parts, also if they have passed
    python -m benchmarks.gpu_check --dry                   # short forms on a CPU, to test that each part runs
    python -m benchmarks.gpu_check --table                 # the committed results as Markdown

Each part is a separate process group with a time limit. After each part, the results are written to
benchmarks/results/gpu_DEVICE.json. A call first runs the parts without a result, then those that failed. Missing
packages are installed from .whl/ (see benchmarks/gpu_wheels.sh), for machines without a network.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from benchmarks.common import NO_GPU, give_up
from benchmarks.gpu_table import summary, table
from benchmarks.suite import ROOT, end_group
from npp_ds.utils.files import write_json_atomic
from npp_ds.utils.gpu_specs import gpu_of_device
from npp_ds.utils.records import git_commit

CORRECTNESS, FIGURE = "correctness", "figure"
FIRST_CALL, SECOND_CALL = 345, 260
"""Limits of two calls in seconds; together they suffice even if each part takes as long as its limit."""
OVERHEAD = 15
"""Most seconds of a call for installing wheels and for querying the machine."""
TOGETHER = 130
"""Seconds for all correctness parts, which run in parallel."""
DRY_PATIENCE = 6
"""Factor on all time limits in a dry run, which may have two shared cores."""
TAIL = 3000
"""Last characters of a part's output that are kept if it did not pass."""


@dataclass(frozen=True)
class Part:
    """A part with its time `limit` in seconds; `command` and `dry` (None: the same) are arguments of Python."""

    name: str
    kind: str
    limit: int
    command: tuple[str, ...]
    dry: tuple[str, ...] | None = None


def own(name: str, kind: str, limit: int) -> Part:
    """Return a part of `benchmarks.gpu_parts`, which uses its short form on a CPU."""
    return Part(name, kind, limit, ("-m", "benchmarks.gpu_parts", name))


def tests(name: str, *selection: str) -> Part:
    """Return a part that runs tests marked `gpu`. A dry run collects and skips them."""
    return Part(name, CORRECTNESS, TOGETHER, ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *selection))


def benchmark(name: str, limit: int, module: str, on_gpu: str, dry: str) -> Part:
    """Return a part that runs another benchmark with these options."""
    commands = (("-m", f"benchmarks.{module}", *options.split()) for options in (on_gpu, dry))
    return Part(name, FIGURE, limit, *commands)


TRAINS = "trains_to_the_end_and_resumes"
PARTS = (
    own("patch loss", CORRECTNESS, TOGETHER),
    own("gradients", CORRECTNESS, TOGETHER),
    own("tokenizer codes", CORRECTNESS, TOGETHER),
    own("synchronisations", CORRECTNESS, TOGETHER),
    tests("zero1", "tests/cli/test_cli.py", "-k", f"{TRAINS} and 1-fp32"),
    tests("zero2", "tests/cli/test_cli.py", "-k", f"{TRAINS} and 2-autocast_bf16"),
    tests("zero3", "tests/cli/test_cli.py", "-k", f"{TRAINS} and 3-bf16"),
    tests("CUDA graphs", "tests/training/test_cuda_graphs.py"),
    tests("CUDA graphs with a loader", "tests/cli/test_cli.py", "-k", "run_with_cuda_graphs"),
    tests(
        "engine with CUDA graphs", "tests/benchmarks/test_mfu_benchmark.py", "-k", "plain_loop_on_a_gpu and False-True"
    ),
    tests("attention kernels", "tests/model/test_attention.py"),
    tests("decoding", "tests/sampling/test_decode.py"),
    tests("loader and waits", "tests/data/test_loader.py", "tests/training/test_throughput.py"),
    own("steps B", FIGURE, 90),
    own("crops", FIGURE, 35),
    benchmark(
        "sampling B", 50, "sampling",
        "--gpu --models B --repeats 1", "--grid-size 3 --vocab-size 64 --batch 2 --repeats 1",
    ),
    own("steps XXL", FIGURE, 90),
    benchmark("attention", 40, "attention", "--gpu --repeats 3", "--fast --repeats 1"),
    own("steps B graphs", FIGURE, 90),
    benchmark("patch loss ways", 25, "patch_loss", "--gpu --fast --repeats 2", "--fast --repeats 1"),
    own("device rates", FIGURE, 15),
)  # fmt: skip
PASSED, FAILED, TIMED_OUT, CUT_OFF = "passed", "failed", "timed out", "cut off"
"""How a part ended. A part that the end of its call cut off counts as not yet run."""


def next_part(waiting: Sequence[Part], left: float) -> Part | None:
    """Return the first part whose limit fits into the seconds left, else the first of which half the limit fits."""
    return next((part for share in (1, 2) for part in waiting if part.limit <= share * left), None)


class Job:
    """A running part. Its output goes to a temporary file."""

    def __init__(self, part: Part, dry: bool, limit: float):
        self.part, self.dry, self.limit, self.began = part, dry, limit, time.monotonic()
        self.log: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - open as long as the job
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "2",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **({"CUDA_VISIBLE_DEVICES": ""} if dry else {}),
        }
        command = [sys.executable, *((part.dry if dry else None) or part.command)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def ended(self) -> bool:
        return self.process.poll() is not None or self.seconds > self.limit

    def outcome(self, own_limit: float) -> tuple[dict[str, Any], str]:
        """Kill the processes that remain. Return (the part's entry in the results, all its output)."""
        seconds, code = self.seconds, self.process.poll()
        end_group(self.process)
        self.log.seek(0)
        output = self.log.read()
        self.log.close()
        entry: dict[str, Any] = {"seconds": round(seconds, 1)}
        if code is None:
            entry["status"] = CUT_OFF if self.limit < 0.9 * own_limit else TIMED_OUT
        elif "pytest" in self.part.command:
            entry["result"] = counts_of(output)
            ran = "skipped" if self.dry else "passed"
            entry["status"] = PASSED if code == 0 and entry["result"].get(ran) else FAILED
        else:
            entry["result"] = json_of(output)
            entry["status"] = PASSED if code == 0 and entry["result"] is not None else FAILED
        if entry["status"] != PASSED:
            entry["output"] = output[-TAIL:]
        return entry, output


def json_of(output: str) -> Any:
    """Return the last JSON object that is on a line by itself, or None."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None


def counts_of(output: str) -> dict[str, int]:
    """Return pytest's closing counts, such as {"passed": 3, "skipped": 1}."""
    outcomes = r"(\d+) (passed|failed|skipped|error)"
    closing = [line for line in output.splitlines() if re.search(rf"{outcomes}.* in [\d.]+s", line)]
    counts = re.findall(outcomes, closing[-1]) if closing else []
    return {what: int(count) for count, what in counts}


class Results:
    """The results of one device, in a file that is rewritten after each part."""

    def __init__(self, path: Path, copies: Path | None, facts: dict[str, Any], commit: str | None):
        self.path, self.copies, self.commit = path, copies, commit
        self.content: dict[str, Any] = {"parts": {}}
        if path.is_file():
            self.content = json.loads(path.read_text())
        self.content = {**facts, "parts": self.content["parts"]}
        path.parent.mkdir(parents=True, exist_ok=True)
        if copies:
            copies.mkdir(parents=True, exist_ok=True)

    def status(self, part: Part) -> str:
        return self.content["parts"].get(part.name, {}).get("status", CUT_OFF)

    def add(self, part: Part, entry: dict[str, Any], output: str) -> None:
        """Add a part's entry and write the file; with `copies`, also write a copy and all output to that folder."""
        self.content["parts"][part.name] = {"kind": part.kind, **entry, "commit": self.commit}
        write_json_atomic(self.path, self.content)
        if self.copies:
            if self.copies.resolve() != self.path.parent.resolve():
                shutil.copyfile(self.path, self.copies / self.path.name)
            with open(self.copies / f"{self.path.stem}.log", "a") as log:
                log.write(f"==== {part.name}: {entry['status']}, {entry['seconds']} s\n{output}\n")


class Runner:
    """Runs parts until `limit` seconds have passed."""

    def __init__(self, results: Results, dry: bool, limit: float):
        self.results, self.dry, self.patience = results, dry, DRY_PATIENCE if dry else 1
        self.began = time.monotonic()
        self.end = self.began + limit

    def run(self, parts: Sequence[Part]) -> None:
        """Run the correctness parts in parallel, then the figures one after the other."""
        correctness = [part for part in parts if part.kind == CORRECTNESS]
        window = time.monotonic() + TOGETHER * self.patience
        self._run(correctness, len(os.sched_getaffinity(0)), min(self.end, window))
        self._run([part for part in parts if part.kind == FIGURE], 1, self.end)

    def _run(self, parts: Sequence[Part], side_by_side: int, end: float) -> None:
        waiting, running = list(parts), []
        try:
            while waiting or running:
                while len(running) < side_by_side and (part := self._next(waiting, end)):
                    waiting.remove(part)
                    limit = min(part.limit * self.patience, end - time.monotonic())
                    running.append(Job(part, self.dry, limit))
                for job in [job for job in running if job.ended()]:
                    running.remove(job)
                    self._note(job)
                if waiting and not running and not self._next(waiting, end):
                    break
                time.sleep(0.05)
        finally:
            for job in running:
                end_group(job.process)

    def _next(self, waiting: Sequence[Part], end: float) -> Part | None:
        return next_part(waiting, (end - time.monotonic()) / self.patience)

    def _note(self, job: Job) -> None:
        entry, output = job.outcome(job.part.limit * self.patience)
        self.results.add(job.part, entry, output)
        at = time.monotonic() - self.began
        print(f"[{at:5.0f} s] {job.part.name}: {entry['status']}, {entry['seconds']:.0f} s", flush=True)
        if entry["status"] in (FAILED, TIMED_OUT):
            print("\n".join(f"    {line[:200]}" for line in output.splitlines()[-8:]), flush=True)


def install_wheels(folder: Path = ROOT / ".whl") -> None:
    """Install the wheels in `folder` that this Python lacks or has in an older version, without a network."""
    from packaging.utils import parse_wheel_filename
    from packaging.version import Version

    missing = []
    for wheel in sorted(folder.glob("*.whl")):
        name, carried, *_ = parse_wheel_filename(wheel.name)
        try:
            if Version(version(name)) >= carried:
                continue
        except PackageNotFoundError:
            pass
        missing.append(str(wheel))
    if missing:
        options = ["-q", "--no-index", "--no-deps", "--no-compile"]
        if subprocess.run([sys.executable, "-m", "pip", "install", *options, *missing]).returncode:
            give_up(f"pip could not install the wheels in {folder}; collect them again with benchmarks/gpu_wheels.sh")


def machine_of(dry: bool) -> dict[str, Any]:
    """Return the device and the versions, found by a separate process. Ends the program if there is no GPU."""
    job = Job(own("machine", CORRECTNESS, 120), dry, 120 * (DRY_PATIENCE if dry else 1))
    try:
        while not job.ended():
            time.sleep(0.05)
    finally:
        entry, output = job.outcome(job.limit)
    if entry["status"] != PASSED:
        give_up(f"the process that queries the machine did not succeed ({entry['status']}):\n{output[-TAIL:]}")
    facts = entry["result"]
    if not dry and facts["device"] is None:
        give_up(NO_GPU.replace("--gpu: ", "").replace("leave --gpu out", "try --dry"))
    return facts


def file_name(device: str | None) -> str:
    """Return the file name of a device's results, from its name in the table of GPUs if it is listed there."""
    known = gpu_of_device(device) if device else None
    slug = known.name if known else re.sub(r"[^a-z0-9]+", "_", (device or "dry").lower()).strip("_")
    return f"gpu_{slug}.json"


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--limit", type=float, metavar="SECONDS", help=f"time limit of the whole call ({FIRST_CALL}; with --dry: none)")
    add("--only", nargs="+", metavar="PART", help="run only these parts, also if they have passed")
    add("--dry", action="store_true", help="short forms on a CPU; results go to build/ unless --results is given")
    add("--results", type=Path, metavar="FOLDER", help="folder of gpu_DEVICE.json (benchmarks/results)")
    add("--out", type=Path, metavar="FOLDER", help="folder for a copy of the results and all output, after each part")
    add("--commit", default=git_commit(), help="commit to note in the results if the tree has no git (%(default)s)")
    add("--list", action="store_true", help="list all parts with their time limits and exit")
    add("--table", action="store_true", help="print the results in the folder as Markdown and exit")
    options = parser.parse_args(arguments)
    names = [part.name for part in PARTS]
    if unknown := [name for name in options.only or () if name not in names]:
        give_up(f"--only {', '.join(unknown)}: no such part; there are {', '.join(names)}")
    options.results = options.results or ROOT / ("build" if options.dry else "benchmarks/results")
    options.limit = options.limit or (float("inf") if options.dry else FIRST_CALL)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    if options.list:
        print("\n".join(f"{part.name:<28}{part.kind:<13}{part.limit:>4} s" for part in PARTS))
        return
    if options.table:
        files = sorted(options.results.glob("gpu_*.json"))
        print("\n".join(table(json.loads(file.read_text())) for file in files) or f"no results in {options.results}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` kills the parts
    began = time.monotonic()
    if not options.dry:
        install_wheels()
    facts = {**machine_of(options.dry), "dry": options.dry}
    results = Results(options.results / file_name(facts["device"]), options.out, facts, options.commit)
    runner = Runner(results, options.dry, options.limit - (time.monotonic() - began))
    asked = [part for part in PARTS if part.name in options.only] if options.only else PARTS
    failed_before = [part for part in asked if results.status(part) in (FAILED, TIMED_OUT)]
    if options.only:
        runner.run(asked)
    else:
        runner.run([part for part in asked if results.status(part) == CUT_OFF])
        runner.run(failed_before)
    print(summary(results.content, PARTS))
    sys.exit(any(results.status(part) != PASSED for part in asked))


if __name__ == "__main__":
    main()
