"""Compare time and memory of the patch loss, forward and backward, with other ways to compute the same.

The published way computes the logits once and repeats them for each of a patch's k codes. "this software" is the loss
with `performance.loss_kernel: torch`; "triton" is the loss with that kernel, on a GPU only. The ways take turns:

    python -m benchmarks.patch_loss --out benchmarks/results          # on a CPU in float32, about 5 minutes
    python -m benchmarks.patch_loss --gpu --out benchmarks/results    # on one GPU in bf16 autocast, B and XXL

Memory is the peak of what one forward and backward pass allocates in addition to its inputs. On a CPU it is computed
from all allocations that PyTorch's profiler records, in the unmeasured round; on a GPU it is
`torch.cuda.max_memory_allocated`. Neither includes the small buffers inside matrix libraries.
"""

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import allocations
from benchmarks.common import command_line, in_the_same_turn, machine, made_by, parsed, publish, spread
from npp_ds.model import patch_cross_entropy
from npp_ds.sizes import SIZES

HERE, PUBLISHED, WHOLE = "this software", "published way", "whole logits"
TRITON, LINEAR, LIGER, PLAIN = "triton", "linear_cross_entropy", "Liger", "plain cross-entropy"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def published(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Repeat each position's logits for each code of its patch, then compute the cross-entropy."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.repeat_interleave(targets.shape[1], 0), targets.flatten())


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Evaluate the formula on all logits at once."""
    logits = F.linear(hidden, weight).float()
    return (logits.logsumexp(1) - logits.gather(1, targets).mean(1)).mean()


def towards_the_mean(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over positions of h . (W[t_1] - mean_i W[t_i]): patch loss minus first-code cross-entropy."""
    mean = F.embedding_bag(targets, weight, mode="mean")
    return (hidden * (F.embedding(targets[:, 0], weight) - mean)).sum(1).float().mean()


def linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute PyTorch's chunked cross-entropy with the first code, and add the rest of the patch loss."""
    first = F.linear_cross_entropy(hidden, weight, targets[:, 0], options=torch.nn.LinearCrossEntropyOptions())
    return first + towards_the_mean(hidden, weight, targets)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute Liger's fused cross-entropy with the first code, and add the rest of the patch loss."""
    fused = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return fused(hidden, weight, targets[:, 0]) + towards_the_mean(hidden, weight, targets)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute next-token cross-entropy; only for k = 1."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets[:, 0])


WAYS: dict[str, Loss] = {
    HERE: patch_cross_entropy, TRITON: partial(patch_cross_entropy, kernel="triton"),
    PUBLISHED: published, WHOLE: whole, LINEAR: linear, LIGER: liger, PLAIN: plain,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The shapes of one measurement: `positions` per pass, `passes` per step."""

    name: str
    width: int
    k: int
    positions: int
    passes: int = 1
    vocab: int = 16384
    device: str = "cpu"

    def ways(self) -> dict[str, Loss]:
        left_out = set() if self.k == 1 else {PLAIN}
        if not hasattr(F, "linear_cross_entropy"):  # the oldest supported PyTorch lacks it
            left_out.add(LINEAR)
        for name, package in ((TRITON, "triton"), (LIGER, "liger_kernel")):
            if self.device == "cpu" or importlib.util.find_spec(package) is None:
                left_out.add(name)
        return {name: loss for name, loss in WAYS.items() if name not in left_out}

    def problem(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return random hidden states [positions, width], output weights [vocab, width] and targets [positions, k]."""
        torch.manual_seed(self.k)
        with torch.device(self.device):
            hidden, weight = torch.randn(self.positions, self.width), torch.randn(self.vocab, self.width) * 0.02
            targets = torch.randint(self.vocab, (self.positions, self.k))
        return hidden.requires_grad_(), weight.requires_grad_(), targets


def forward_and_backward(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, passes: int = 1) -> Tensor:
    """Return a step's loss; its gradients are in `hidden.grad` and `weight.grad`."""
    hidden.grad = weight.grad = None
    for _ in range(passes):
        with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=hidden.is_cuda):
            value = loss(hidden, weight, targets)
        value.backward()
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return value.detach()


def peak_bytes(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> int:
    """Return the peak number of bytes that a pass allocates in addition to what was allocated before."""
    hidden.grad = weight.grad = None
    if hidden.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_and_backward(loss, hidden, weight, targets)
        return torch.cuda.max_memory_allocated() - before
    return allocations.peak_bytes(allocations.allocations(lambda: forward_and_backward(loss, hidden, weight, targets)))


def measure(cases: list[Case], repeats: int) -> list[dict]:
    """Measure seconds and bytes of every way. A round has a turn for each case and way; the first measures memory."""
    rows = [{"case": case, "seconds": {n: [] for n in case.ways()}, "bytes": {}} for case in cases]
    for turn in range(repeats + 1):
        for row in rows:
            problem = row["case"].problem()
            for name, loss in row["case"].ways().items():
                if turn == 0:
                    row["bytes"][name] = peak_bytes(loss, *problem)
                    continue
                started = time.perf_counter()
                forward_and_backward(loss, *problem, passes=row["case"].passes)
                row["seconds"][name].append(time.perf_counter() - started)
    return rows


def figures(row: dict) -> dict:
    """Return a case for the JSON object: median and range in seconds, bytes, and their ratios to this software."""
    case, seconds, taken = row["case"], row["seconds"], row["bytes"]
    return {
        **{name: getattr(case, name) for name in ("name", "width", "k", "positions", "passes", "vocab")},
        "ways": {
            name: {
                **spread(times),
                "bytes": taken[name],
                "time_ratio": in_the_same_turn(times, seconds[HERE])["median"],
                "memory_ratio": taken[name] / taken[HERE],
            }
            for name, times in seconds.items()
        },
    }


def ratios_of(rows: list[dict]) -> dict[str, float]:
    """Return time or memory of the alternatives over ours, and our time at k = 1 over k = 16; larger is better."""
    found = {}
    for row in rows:
        ways, label = figures(row)["ways"], f"{row['case'].name}_k{row['case'].k}"
        found[f"published_time_{label}"] = ways[PUBLISHED]["time_ratio"]
        found[f"published_memory_{label}"] = ways[PUBLISHED]["memory_ratio"]
        if PLAIN in ways:
            found[f"plain_time_{label}"] = ways[PLAIN]["time_ratio"]
    ours = {(row["case"].name, row["case"].k): row["seconds"][HERE] for row in rows}
    for (name, k), seconds in ours.items():
        if k == 16:
            found[f"k1_over_k16_{name}"] = in_the_same_turn(ours[name, 1], seconds)["median"]
    return {name: round(ratio, 3) for name, ratio in found.items()}


CPU_WANTED = {
    "published_time_w256_k16": 6.5, "published_time_w768_k16": 4.5,
    "published_memory_w256_k16": 7.5, "published_memory_w768_k16": 7.5,
    "k1_over_k16_w256": round(1 / 1.15, 3), "k1_over_k16_w768": round(1 / 1.15, 3),
    "plain_time_w256_k1": 1.0, "plain_time_w768_k1": 1.0,
}  # fmt: skip
MEANING = {
    "published_time": "time of the published way to ours",
    "published_memory": "extra memory of the published way to ours",
    "plain_time": "time of plain cross-entropy to ours",
    "k1_over_k16": "our time at k = 1 to that at k = 16 (k = 16 may take up to 1.15 times as long)",
}


def cpu_cases(fast: bool) -> list[Case]:
    if fast:
        return [Case("w256", 256, k, 512) for k in (1, 16)]
    return [Case(f"w{d}", d, k, 512 if k == 64 else 2048) for d in (256, 768) for k in (1, 4, 16, 64)]


def gpu_cases(fast: bool) -> list[Case]:
    """Return cases with the positions of a training step: 256 images of 256 / k positions each.

    A pass has so few positions that a GPU can hold k times as many logits, as the published way does.
    """
    cases = []
    for size in ("B",) if fast else ("B", "XXL"):
        for k in (1, 4, 16, 64):
            step = 65536 // k
            each = min(step, 32768 // k)
            cases.append(Case(size, SIZES[size]["dim"], k, each, step // each, device="cuda"))
    return cases


def table(result: dict) -> str:
    gpu = result["device"] != "CPU"
    lines = [
        f"# The patch loss, forward and backward{', on a GPU' if gpu else ''}",
        "",
        f"{'bf16 autocast' if gpu else 'float32'}; medians of {result['repeats']} rounds in which all of a width "
        "take turns. Memory is the peak of what is allocated in addition to the inputs. `to ours` is the ratio to this "
        "software in the same round.",
        "",
        "| model | vocabulary | k | positions | way | ms | lowest .. highest | to ours | MB | to ours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        positions = f"{case['positions']:,}" + (f" x {case['passes']}" if case["passes"] > 1 else "")
        what = f"{case['width']} wide | {case['vocab']:,} | {case['k']} | {positions}"
        for name, f in case["ways"].items():
            lines.append(
                f"| {what} | {name} | {f['median'] * 1e3:,.1f} | {f['lowest'] * 1e3:,.1f} .. {f['highest'] * 1e3:,.1f} "
                f"| {f['time_ratio']:.2f} | {f['bytes'] / 1e6:,.1f} | {f['memory_ratio']:.2f} |"
            )
    if result["wanted"]:
        lines += ["", "| required, larger is better | at least | found | met |", "|---|---|---|---|"]
    for name, bound in result["wanted"].items():
        found = result["ratios"][name]
        what = next(f"{text} ({name})" for start, text in MEANING.items() if name.startswith(start))
        lines.append(f"| {what} | {bound} | {found} | {'yes' if found >= bound else 'no'} |")
    if gpu and not any(LIGER in case["ways"] for case in result["cases"]):
        lines += ["", "Liger (package liger-kernel) is not installed and was not measured."]
    lines += ["", made_by(result, f"{result['threads']} threads")]
    return "\n".join(lines) + "\n"


def main() -> None:
    fast = "width 256, k = 1 and 16, 512 positions; on a GPU only size B"
    gpu = "measure the positions of a training step on the first GPU, bf16 autocast"
    parser = command_line(__doc__, fast, gpu, repeats=5)
    threads = min(2, len(os.sched_getaffinity(0)))
    parser.add_argument("--threads", type=int, default=threads, help="CPU threads (%(default)s)")
    options = parsed(parser)
    torch.set_num_threads(options.threads)
    cases = (gpu_cases if options.gpu else cpu_cases)(options.fast)
    models = [[case for case in cases if case.name == name] for name in dict.fromkeys(case.name for case in cases)]
    rows = [row for model in models for row in measure(model, options.repeats)]
    result = {
        "benchmark": "patch_loss_gpu" if options.gpu else "patch_loss",
        "device": torch.cuda.get_device_name() if options.gpu else "CPU",
        "repeats": options.repeats,
        "threads": options.threads,
        "cases": [figures(row) for row in rows],
        "ratios": ratios_of(rows),
        "wanted": {} if options.gpu or options.fast else CPU_WANTED,
        "fast": options.fast,
        "machine": machine("torch", gpu=options.gpu),
    }
    publish(result, table(result), options.out)


if __name__ == "__main__":
    main()
