"""Causal attention, forward and backward, by every kernel that a device has: 4 to 576 positions of 64-wide heads.

    python -m benchmarks.attention --out benchmarks/results
    python -m benchmarks.attention --gpu --out benchmarks/results
    python -m benchmarks.attention --gpu --write-choice      # what `model.attention: auto` then goes by on such GPUs

On a GPU it is the time of the kernels alone: the host starts them while the GPU is kept busy with something else, as
in a recorded step. The kernels take turns.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common import command_line, machine, made_by, publish, require_gpu
from npp_ds.errors import UserError
from npp_ds.files import write_json_atomic
from npp_ds.model.attention_kernels import KERNELS, MEASURED, check_attention, chosen_kernel, use_flash_implementation

WIDTH = 64
HEADS = {"B": 12, "XXL": 24}
POSITIONS = (4, 16, 64, 144, 256, 576)
OWN_CHOICE = "sdpa"
TWINS = {"sdpa_flash", "flash_attn_4"}  # one process cannot have both
CALLS = 20  # in one measurement on a GPU
BUSY_CYCLES = 40_000_000  # of the GPU, about 20 ms: the host starts `CALLS` calls meanwhile


class Case(NamedTuple):
    """Tensors of [images, positions, heads, 64] of a model of this name."""

    model: str
    images: int
    heads: int
    positions: int
    device: str
    dtype: torch.dtype


def inputs_of(case: Case) -> tuple[list[Tensor], Tensor]:
    """([q, k, v], gradient of what comes out)."""
    generator = torch.Generator(case.device).manual_seed(0)
    shape = case.images, case.positions, case.heads, WIDTH
    tensors = [torch.randn(shape, generator=generator, device=case.device).to(case.dtype) for _ in range(4)]
    return [x.requires_grad_() for x in tensors[:3]], tensors[3]


def pass_of(kernel: str, qkv: list[Tensor], gradient: Tensor) -> Callable[[], list[Tensor]]:
    """Runs the kernel forward and backward: [what comes out, gradients of q, k and v]."""

    def run() -> list[Tensor]:
        out = KERNELS[kernel](*qkv, 0.0)
        return [out, *torch.autograd.grad(out, qkv, gradient)]

    return run


def seconds_of(run: Callable[[], list[Tensor]], device: str) -> float:
    """Of one pass."""
    if device == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    began.record()
    for _ in range(CALLS):
        run()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000 / CALLS


def hindrance(kernel: str, case: Case) -> str | None:
    """Why this device cannot run the kernel."""
    try:
        check_attention(kernel)
        device = torch.device(case.device, 0) if case.device == "cuda" else torch.device(case.device)
        chosen_kernel(kernel, device, case.dtype, case.positions, case.heads, case.heads, WIDTH, False)
    except UserError as error:
        return str(error)
    return None


def prepare(kernel: str) -> None:
    use_flash_implementation("FA4" if kernel == "flash_attn_4" else None)


def measure(case: Case, repeats: int) -> list[dict]:
    """A row for each kernel: its seconds, and the largest difference of its results from those in double precision."""
    qkv, gradient = inputs_of(case)
    expected = exact(qkv, gradient)
    rows, passes, seconds = {}, {}, {}
    for kernel in KERNELS:
        rows[kernel] = {"model": case.model, "positions": case.positions, "kernel": kernel}
        if reason := hindrance(kernel, case):
            rows[kernel]["failed"] = reason
            continue
        prepare(kernel)
        try:
            run = pass_of(kernel, qkv, gradient)
            found = run()
            seconds_of(run, case.device)  # unmeasured
        except Exception as error:  # a kernel of another library may fail in any way; the rest is measured
            rows[kernel]["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        firsts = (x[: len(e)] for x, e in zip(found, expected, strict=True))
        pairs = zip(firsts, expected, strict=True)
        rows[kernel]["largest_difference"] = max((x.double() - e).abs().max().item() for x, e in pairs)
        passes[kernel], seconds[kernel] = run, []
        del found
    for _ in range(repeats):
        for kernel, run in passes.items():
            prepare(kernel)
            seconds[kernel].append(seconds_of(run, case.device))
    prepare(OWN_CHOICE)
    for kernel, values in seconds.items():
        rows[kernel]["seconds"] = {"median": median(values), "lowest": min(values), "highest": max(values)}
    return list(rows.values())


def exact(qkv: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Output and gradients of the first image, in double precision and without a kernel."""
    q, k, v = (x[:1].detach().double().transpose(1, 2).requires_grad_() for x in qkv)
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2) / WIDTH**0.5).masked_fill(future, -torch.inf)
    out = scores.softmax(-1) @ v
    gradients = torch.autograd.grad(out, (q, k, v), gradient[:1].double().transpose(1, 2))
    return [x.detach().transpose(1, 2) for x in (out, *gradients)]


def order_of(rows: list[dict]) -> dict[str, list[str]]:
    """By number of positions: kernels from fastest to slowest, each model's times relative to its fastest kernel.

    Of PyTorch's flash kernel and flash-attn-4, which takes its place, only that one is named with which the fastest
    kernels together take less.
    """
    fastest: dict[tuple[str, int], float] = {}
    for row in rows:
        if "seconds" in row:
            key = row["model"], row["positions"]
            fastest[key] = min(fastest.get(key, float("inf")), row["seconds"]["median"])
    relative: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        if "seconds" in row and row["kernel"] != OWN_CHOICE:
            slower = row["seconds"]["median"] / fastest[row["model"], row["positions"]]
            relative.setdefault(row["positions"], {}).setdefault(row["kernel"], []).append(slower)
    means = {n: {k: sum(values) / len(values) for k, values in kernels.items()} for n, kernels in relative.items()}

    def without(kernel: str) -> dict[int, dict[str, float]]:
        return {n: {k: value for k, value in kernels.items() if k != kernel} for n, kernels in means.items()}

    def total(kernels: dict[int, dict[str, float]]) -> float:
        return sum(min(by_kernel.values(), default=float("inf")) for by_kernel in kernels.values())

    best = min((without(twin) for twin in sorted(TWINS)), key=total)
    return {str(n): sorted(kernels, key=kernels.get) for n, kernels in sorted(best.items())}


def write_choice(order: dict[str, list[str]], path: Path, capability: str, gpu: str) -> None:
    """Puts a kind of GPU into the file that `auto` goes by; other kinds stay."""
    known = json.loads(path.read_text())
    known["devices"][capability] = {"gpu": gpu, "torch": torch.__version__, "order": order}
    write_json_atomic(path, known)


def ratios_of(rows: list[dict]) -> dict[str, float]:
    """How many times as long SDPA's own choice takes as the fastest kernel."""
    seconds = {(r["model"], r["positions"], r["kernel"]): r["seconds"]["median"] for r in rows if "seconds" in r}
    ratios = {}
    for model, positions, kernel in seconds:
        if kernel == OWN_CHOICE:
            best = min(s for (m, n, _), s in seconds.items() if (m, n) == (model, positions))
            ratios[f"{model}_{positions}_fastest_over_sdpa"] = seconds[model, positions, kernel] / best
    return ratios


def table(result: dict) -> str:
    rows = result["cases"]
    lines = [
        f"# Causal attention, forward and backward{' on a GPU' if result['on_gpu'] else ''}",
        "",
        f"Microseconds of one pass over {result['images']} images, heads {WIDTH} wide, {result['dtype']}, medians of "
        f"{result['repeats']} turns (lowest .. highest). `sdpa` is PyTorch's own choice.",
        "",
        "| model | positions | kernel | microseconds | times the fastest | largest difference from exact |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            continue
        group = [r for r in rows if (r["model"], r["positions"]) == (row["model"], row["positions"])]
        best = min(r["seconds"]["median"] for r in group if "seconds" in r)
        s = {name: value * 1e6 for name, value in row["seconds"].items()}
        lines.append(
            f"| {row['model']} | {row['positions']} | {row['kernel']} | "
            f"{s['median']:,.0f} ({s['lowest']:,.0f} .. {s['highest']:,.0f}) | "
            f"{row['seconds']['median'] / best:.2f} | {row['largest_difference']:.1e} |"
        )
    reasons = {f"{r['kernel']} ({r['failed']})": None for r in rows if "failed" in r}
    lines += ["", *(["Not run: " + "; ".join(reasons) + ".", ""] if reasons else [])]
    lines += [made_by(result)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    gpu = "shapes of B and XXL in bf16 on the first GPU, about 1 minute"
    parser = command_line(__doc__, "few shapes, few turns", gpu, repeats=5)
    add = parser.add_argument
    add("--write-choice", action="store_true", help=f"write what is fastest to {MEASURED.name}, for this kind of GPU")
    add("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="of the CPU (%(default)s)")
    options = parser.parse_args(arguments)
    if options.write_choice and not options.gpu:
        parser.error("--write-choice goes with --gpu: a CPU has one fused kernel, there is nothing to choose")
    if options.gpu:
        require_gpu()
    torch.set_num_threads(options.threads)
    repeats = min(3, options.repeats) if options.fast else options.repeats
    positions = (16, 64) if options.fast else POSITIONS
    models, images, device, dtype = {"small": 4}, 8, "cpu", torch.float32
    if options.gpu:
        models, images, device, dtype = HEADS, 256, "cuda", torch.bfloat16
    cases = [Case(m, images, heads, n, device, dtype) for m, heads in models.items() for n in positions]
    rows = [row for case in cases for row in measure(case, repeats)]
    result = {
        "benchmark": "attention_gpu" if options.gpu else "attention",
        "on_gpu": options.gpu,
        "fast": options.fast,
        "images": images,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "cases": rows,
        "order": order_of(rows),
        "ratios": ratios_of(rows),
        "wanted": {},
        "machine": machine("torch", gpu=options.gpu),
    }
    publish(result, table(result), options.out)
    if options.write_choice:
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        write_choice(result["order"], MEASURED, capability, torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
