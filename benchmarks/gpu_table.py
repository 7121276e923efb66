"""Format the results of `benchmarks.gpu_check`: a summary for the terminal, and tables for docs/performance.md."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.common import ratio_rows

Content = Mapping[str, Any]
"""The content of a file benchmarks/results/gpu_DEVICE.json."""


def result_of(content: Content, name: str) -> dict[str, Any]:
    """Return a part's result, or {} if it has not passed."""
    entry = content["parts"].get(name, {})
    return entry["result"] if entry.get("status") == "passed" else {}


def wanted_rows(content: Content) -> list[str]:
    """Return a table line for each figure that has a required minimum; none for a dry run."""
    rows = []
    if content["dry"]:
        return rows
    for name in content["parts"]:
        result = result_of(content, name)
        if isinstance(result.get("ratios"), dict):
            rows += ["| " + " | ".join(row) + " |" for row in ratio_rows(result) if row[2]]
    return ["| figure (larger is better) | measured | required | |", "|---|---|---|---|", *rows] if rows else []


def versions(content: Content) -> str:
    known = (f"{name} {value}" for name, value in content["versions"].items() if value is not None)
    missing = [name for name, value in content["versions"].items() if value is None]
    return ", ".join(known) + (f"; not installed: {', '.join(missing)}" if missing else "")


def summary(content: Content, parts: Sequence[Any]) -> str:
    """Return the status of each part, and each figure with its required minimum."""
    lines = ["", f"{content['device'] or 'dry run on a CPU'}: {versions(content)}"]
    for part in parts:
        entry = content["parts"].get(part.name)
        status = f"{entry['status']}, {entry['seconds']:.0f} s" if entry else "not run"
        counts = entry.get("result") if entry else None
        skipped = f", {counts['skipped']} tests skipped" if isinstance(counts, dict) and "skipped" in counts else ""
        lines.append(f"  {part.name:<28}{status}{skipped}")
    if rows := wanted_rows(content):
        lines += ["", *rows]
    if content["versions"]["flash-attn"] is None:
        lines += ["", "flash-attn is not installed, so its kernel was not run."]
    return "\n".join(lines)


def table(content: Content) -> str:
    """Return a device's results as Markdown."""
    parts = content["parts"]
    commits = ", ".join(sorted({entry["commit"] or "unknown" for entry in parts.values()}))
    lines = [f"### {content['device'] or 'Dry run on a CPU'}", "", f"{versions(content)}. Commit {commits}.", ""]
    for section in (wanted_rows, _steps, _schedule, _crops, _sampling, _attention, _agreement, _waits):
        if rows := list(section(content)):
            lines += [*rows, ""]
    correctness = [(name, entry) for name, entry in parts.items() if entry["kind"] == "correctness"]
    passed = [name for name, entry in correctness if entry["status"] == "passed"]
    lines.append(f"Correct: {', '.join(passed) or 'none'}.")
    if others := [f"{name} ({entry['status']})" for name, entry in parts.items() if entry["status"] != "passed"]:
        lines.append(f"Not passed: {', '.join(others)}.")
    if content["versions"]["flash-attn"] is None:
        lines.append("flash-attn was not installed, so its kernel was not run.")
    return "\n".join(lines) + "\n"


def _steps(content: Content) -> Iterator[str]:
    results = [result_of(content, name).get("cases", ()) for name in content["parts"] if name.startswith("steps ")]
    if not any(results):
        return
    yield "| model | patch side | way | images at a time | ms a step | over side 1 | MFU | peak GB | first two, s |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for rows in results:
        at_one = next((row["seconds"] for row in rows if row["patch_side"] == 1), float("nan"))
        for row in rows:
            mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
            memory = "" if row["peak_memory_gb"] is None else f"{row['peak_memory_gb']:.1f}"
            yield (
                f"| {row['size']} | {row['patch_side']} | {row['way']} | {row['micro_batch']} | "
                f"{1000 * row['seconds']:.1f} | {row['seconds'] / at_one:.3f} | {mfu} | {memory} | "
                f"{row['first_two_seconds']:.0f} |"
            )


def _schedule(content: Content) -> Iterator[str]:
    for name in content["parts"]:
        if schedule := result_of(content, name).get("schedule"):
            yield (
                f"- Wall-clock time of four levels over next-token training ({name}): {schedule['share']:.3f}; "
                f"{schedule['hours']:.1f} h and {schedule['next_token_hours']:.1f} h on one GPU; {schedule['how']}. "
                "Compiling, loading, validating and saving are not included."
            )


def _crops(content: Content) -> Iterator[str]:
    if rates := result_of(content, "crops").get("crops_per_second"):
        yield "| encoder of VQ-16, random weights | " + " | ".join(rates) + " |"
        yield "|---|" + "---|" * len(rates)
        yield "| crops a second | " + " | ".join(f"{rate:,.0f}" for rate in rates.values()) + " |"


def _sampling(content: Content) -> Iterator[str]:
    for model in result_of(content, "sampling B").get("models", ()):
        for way, rate in model["images_per_second"].items():
            yield f"- {model['model']}, images sampled per second, {way}: {rate['median']:.1f}"


def _attention(content: Content) -> Iterator[str]:
    rows = [row for row in result_of(content, "attention").get("cases", ()) if "seconds" in row]
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    if not rows:
        return
    yield f"| attention, microseconds | {' | '.join(kernels)} |"
    yield "|---|" + "---|" * len(kernels)
    for model, positions in dict.fromkeys((row["model"], row["positions"]) for row in rows):
        group = {
            r["kernel"]: r["seconds"]["median"] for r in rows if (r["model"], r["positions"]) == (model, positions)
        }
        cells = (f"{1e6 * group[kernel]:,.0f}" if kernel in group else "" for kernel in kernels)
        yield f"| {model}, {positions} positions | {' | '.join(cells)} |"


def _agreement(content: Content) -> Iterator[str]:
    for name, result in result_of(content, "tokenizer codes").items():
        shares = ", ".join(f"{p} {share:.2%}" for p, share in result["share of codes as on the CPU"].items())
        yield f"- Codes that equal those in fp32 on the CPU, {name}: {shares}"


def _waits(content: Content) -> Iterator[str]:
    for stage, counts in result_of(content, "synchronisations").items():
        yield f"- Waits of the host for the device in a step, {stage}: " + ", ".join(
            f"{name} {count:g}" for name, count in counts.items()
        )
