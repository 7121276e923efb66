"""Time all kernels of causal attention, forward and backward, for 4 to 576 positions and heads of 64 features.

    python -m benchmarks.attention --out benchmarks/results
    python -m benchmarks.attention --gpu --out benchmarks/results

On a GPU, only the kernels are timed: the host launches them while the GPU is busy with other work, as in a CUDA graph.
The kernels are timed in turn.
"""

import os
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common import command_line, machine, made_by, publish, require_gpu
from npp_ds.errors import UserError
from npp_ds.model.attention import KERNELS, causal_attention, check_attention

HEAD_DIM = 64
HEADS = {"B": 12, "XXL": 24}
POSITIONS = (4, 16, 64, 144, 256, 576)
CALLS = 20
"""Passes in one measurement on a GPU."""
BUSY_CYCLES = 40_000_000
"""GPU cycles (about 20 ms) during which the host launches `CALLS` passes."""


class Case(NamedTuple):
    """The shape [images, positions, heads, 64] of q, k and v of a model size."""

    model: str
    images: int
    heads: int
    positions: int
    device: str
    dtype: torch.dtype


def inputs_of(case: Case) -> tuple[list[Tensor], Tensor]:
    """Return ([q, k, v], gradient of the output), each of the case's shape and dtype."""
    generator = torch.Generator(case.device).manual_seed(0)
    shape = case.images, case.positions, case.heads, HEAD_DIM
    tensors = [torch.randn(shape, generator=generator, device=case.device).to(case.dtype) for _ in range(4)]
    return [x.requires_grad_() for x in tensors[:3]], tensors[3]


def pass_of(kernel: str, qkv: list[Tensor], gradient: Tensor) -> Callable[[], list[Tensor]]:
    """Return a function that runs the kernel forward and backward: [output, gradients of q, k and v]."""

    def run() -> list[Tensor]:
        out = causal_attention(*qkv, kernel)
        return [out, *torch.autograd.grad(out, qkv, gradient)]

    return run


def seconds_of(run: Callable[[], list[Tensor]], device: str) -> float:
    """Return the seconds of one pass."""
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


def measure(case: Case, repeats: int) -> list[dict]:
    """Return a row for each kernel: its seconds, and the largest difference of its results from those in float64."""
    qkv, gradient = inputs_of(case)
    expected = exact(qkv, gradient)
    rows, passes, seconds = {}, {}, {}
    for kernel in KERNELS:
        rows[kernel] = {"model": case.model, "positions": case.positions, "kernel": kernel}
        try:
            check_attention(kernel)
            run = pass_of(kernel, qkv, gradient)
            found = run()
            seconds_of(run, case.device)  # warm-up
        except UserError as error:
            rows[kernel]["failed"] = str(error)
            continue
        except Exception as error:  # a kernel of another library can fail in any way; measure the others
            rows[kernel]["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        firsts = (x[: len(e)] for x, e in zip(found, expected, strict=True))
        pairs = zip(firsts, expected, strict=True)
        rows[kernel]["largest_difference"] = max((x.double() - e).abs().max().item() for x, e in pairs)
        passes[kernel], seconds[kernel] = run, []
        del found
    for _ in range(repeats):
        for kernel, run in passes.items():
            seconds[kernel].append(seconds_of(run, case.device))
    for kernel, values in seconds.items():
        rows[kernel]["seconds"] = {"median": median(values), "lowest": min(values), "highest": max(values)}
    return list(rows.values())


def exact(qkv: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Return output and gradients of the first image, computed in float64 from the definition."""
    q, k, v = (x[:1].detach().double().transpose(1, 2).requires_grad_() for x in qkv)
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2) / HEAD_DIM**0.5).masked_fill(future, -torch.inf)
    out = scores.softmax(-1) @ v
    gradients = torch.autograd.grad(out, (q, k, v), gradient[:1].double().transpose(1, 2))
    return [x.detach().transpose(1, 2) for x in (out, *gradients)]


def ratios_of(rows: list[dict]) -> dict[str, float]:
    """Return the time of PyTorch's choice of kernel over that of the fastest kernel, by model and positions."""
    seconds = {(r["model"], r["positions"], r["kernel"]): r["seconds"]["median"] for r in rows if "seconds" in r}
    ratios = {}
    for model, positions, kernel in seconds:
        if kernel == "sdpa":
            best = min(s for (m, n, _), s in seconds.items() if (m, n) == (model, positions))
            ratios[f"{model}_{positions}_fastest_over_sdpa"] = seconds[model, positions, kernel] / best
    return ratios


def table(result: dict) -> str:
    rows = result["cases"]
    lines = [
        f"# Causal attention, forward and backward{' on a GPU' if result['on_gpu'] else ''}",
        "",
        f"Microseconds of one pass over {result['images']} images, {HEAD_DIM} features per head, {result['dtype']}, "
        f"medians of {result['repeats']} turns (lowest .. highest). `sdpa` is PyTorch's choice.",
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
    threads = min(2, len(os.sched_getaffinity(0)))
    parser.add_argument("--threads", type=int, default=threads, help="CPU threads (%(default)s)")
    options = parser.parse_args(arguments)
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
        "ratios": ratios_of(rows),
        "wanted": {},
        "machine": machine("torch", gpu=options.gpu),
    }
    publish(result, table(result), options.out)


if __name__ == "__main__":
    main()
