"""The page of the study, made from its results alone: tables with paired intervals, curves, samples, and statements."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from shutil import copyfile
from statistics import mean, stdev
from typing import IO, Any

from npp_ds.utils.files import read_json, write_atomic, write_text_atomic
from studies.claim.muon import MUON_FILE
from studies.claim.plan import Plan
from studies.claim.seconds import key_of, read_seconds

SIDE_BY_SIDE = 2
STUDENT_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706)  # of 1, 2, .. degrees of freedom
COLORS = ("#4878a8", "#d1773a", "#5a9a5a", "#8d6aa8", "#b0413e", "#6b6b6b")
QUESTIONS = (  # with the two arms whose difference decides
    ("A, with the paper's recipe: equal epochs, no worse", "paper-confirmed", "next-best"),
    ("A, with the best recipe: equal epochs, no worse", "npp-best-epochs", "next-best"),
    ("B, with the paper's recipe: equal FLOPs, better", "paper-flops", "next-best"),
    ("B, with the best recipe: equal FLOPs, better", "npp-best-flops", "next-best"),
    ("The best recipe against the paper's: equal FLOPs, better", "npp-best-flops", "paper-flops"),
)
HEAD = """# Does next patch prediction help? A study on small natural images

Two questions. **A**, the paper's claim: with equal epochs, at about 0.6 of the cost, next patch prediction is no worse
than next-token training. **B**: with equal FLOPs it is better. Next-token training is tuned first.

The plan, `studies/claim/{plan}`, was fixed before the first run. Differences are paired by seed, with a 95 % t
interval; negative is better. "Better" and "worse" mean that the interval excludes 0, "no worse" that it ends below
{margin} nats, "undecided" none of these; the loss decides, the Frechet distance is reported beside it. Losses are nats
per code at patch side 1 on {validation:,} validation images, in part 4 also on the test images. Models have {n_layers}
layers of width {dim} and train on {train:,} images of {image_size}x{image_size} pixels, as {grid_size}x{grid_size}
codes. {features} The guidance scale is that with the best distance of a sweep.
"""
OF_A_CLASSIFIER = (
    "Frechet distance and class agreement use a small classifier of such images: compare them with no other."
)
OF_INCEPTION = "Frechet distances are those of Inception's features to the training images."


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return mean and half width of the 95 % t interval of at least two paired differences."""
    n = len(differences)
    return mean(differences), STUDENT_95[n - 2] * stdev(differences) / n**0.5


def verdict(difference: float, half: float, margin: float) -> str:
    """Return what an interval of differences in loss decides by the plan's rule."""
    if difference + half < 0:
        return "better"
    if difference - half > 0:
        return "worse"
    return "no worse" if difference + half < margin else "undecided"


Results = dict[str, dict[int, dict[str, Any]]]


def results_of(plan: Plan) -> Results:
    """Return the results so far by arm and seed."""
    found: Results = {}
    for part in plan.parts:
        for run in plan.runs(part):
            if (result := plan.result(run)) is not None:
                found.setdefault(run.arm, {})[run.seed] = result
    return found


def compared(results: Results, arm: str, baseline: str, key: str) -> tuple[float, float] | None:
    """Return the interval of the differences between two arms over the seeds that both have, None for under two."""
    a, b = results.get(arm, {}), results.get(baseline, {})
    pairs = [a[seed][key] - b[seed][key] for seed in sorted(a.keys() & b.keys()) if key in a[seed] and key in b[seed]]
    return interval(pairs) if len(pairs) > 1 and arm != baseline else None


def write_page(plan: Plan, path: Path) -> None:
    """Write the page, and its pictures to images/ beside it."""
    results, keys = results_of(plan), plan.keys
    features = OF_A_CLASSIFIER if plan.classifier else OF_INCEPTION
    names = {**keys["data"], **keys["model"], "margin": keys["margin"], "plan": plan.path.name, "features": features}
    text = [HEAD.format(**names), "## What holds\n", *_statements(plan, results)]
    if (notes := plan.path.with_name(f"{plan.path.stem}_notes.md")).is_file():
        text.append("\n" + notes.read_text().rstrip())
    for number, part in plan.parts.items():
        runs = plan.runs(number)
        finished = sum(run.seed in results.get(run.arm, {}) for run in runs)
        text.append(f"\n## Part {number}: {part['title']}\n")
        if not finished:
            text.append("Has not run yet.")
            continue
        if finished < len(runs):
            text.append(f"{finished} of {len(runs)} runs have finished.\n")
        text += _table(plan, results, number)
        picture = path.parent / "images" / f"{path.stem}_part_{number}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        arms = [arm for arm in part["arms"] if arm in results]
        write_atomic(picture, partial(_plot, plan=plan, results=results, arms=arms))
        text.append(f"\n![Loss over the course of training](images/{picture.name})")
        text += _samples(plan, number, arms, picture)
    text += _muon(plan)
    text += [
        "\n## Commands\n",
        "```",
        "python -m studies.claim --images IMAGES --out study --part 1    # then the next ones",
    ]
    text += [
        "python -m studies.claim --images IMAGES --out study --part muon",
        "python -m studies.claim --images IMAGES --out study --part seconds",
        "python -m studies.claim --page docs/study.md",
    ]
    machines = sorted({r["machine"] + f", torch {r['torch']}" for of_arm in results.values() for r in of_arm.values()})
    text += [
        "```",
        f"\nRuns so far were made on: {'; '.join(machines) or 'none'}. Core seconds are processor time of "
        "training, more on a busy machine; `--part seconds` measures the seconds of an idle one.",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, "\n".join(text) + "\n")


def _samples(plan: Plan, number: int, arms: Sequence[str], picture: Path) -> list[str]:
    """Copy the first samples of the arms beside `picture`; return a table that shows them side by side."""
    seed, shown = plan.parts[number]["seeds"][0], {}
    for arm in arms:
        if (samples := plan.results / f"{number}-{arm}-seed{seed}.png").is_file():
            shown[arm] = picture.with_name(f"{picture.stem}_{arm}.png")
            copyfile(samples, shown[arm])
    if not shown:
        return []
    pictures = [f"![samples of {arm}](images/{file.name})" for arm, file in shown.items()]
    lines = [f"\nSamples with seed {seed}, the classes in turn from left to right:\n"]
    for row in range(0, len(shown), SIDE_BY_SIDE):
        cells = list(shown)[row : row + SIDE_BY_SIDE], pictures[row : row + SIDE_BY_SIDE]
        lines += [f"| {' | '.join(cells[0])} |", "|" + "---|" * len(cells[0]), f"| {' | '.join(cells[1])} |", ""]
    return lines[:-1]


def _statements(plan: Plan, results: Results) -> list[str]:
    lines = []
    for question, arm, baseline in QUESTIONS:
        if arm not in plan.part_of or baseline not in plan.part_of:
            continue
        found = compared(results, arm, baseline, "test_nats")
        if found is None:
            part = max(plan.part_of[arm], plan.part_of[baseline])
            lines.append(f"- {question}: not decided yet; part {part} decides.")
        else:
            said = verdict(*found, plan.keys["margin"])
            line = f"- {question}: **{said}** ({found[0]:+.4f} ± {found[1]:.4f} nats on test images)"
            if distance := compared(results, arm, baseline, "frechet_distance"):
                line += f"; Frechet distance {verdict(*distance, 0)} ({distance[0]:+.3g} ± {distance[1]:.2g})"
            lines.append(f"{line}.")
    return lines


def _table(plan: Plan, results: Results, number: int) -> list[str]:
    part = plan.parts[number]
    baseline = part.get("baseline", "")
    arms = [*([baseline] if baseline and baseline not in part["arms"] else []), *part["arms"]]
    columns = ["arm", "settings of", "batch", "peak rate", "updates", "FLOPs"]
    columns += ["nats, mean", "nats, by seed", "difference", ""]
    optional = {"test_nats": "test nats", "frechet_distance": "Frechet distance", "class_agreement": "class agreement"}
    optional = {k: v for k, v in optional.items() if any(k in r for arm in arms for r in results.get(arm, {}).values())}
    seconds = read_seconds(plan)
    columns += [*optional.values(), "core seconds", *(["seconds, idle"] if seconds else [])]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for arm in arms:
        runs = [result for _, result in sorted(results.get(arm, {}).items())]
        if not runs:
            continue
        difference = compared(results, arm, baseline, "nats")
        cells = [
            arm,
            runs[0]["chosen"] or "",
            ", ".join(dict.fromkeys(str(s["batch_size"]) for s in runs[0]["stages"])),
            ", ".join(dict.fromkeys(f"{s['learning_rate']:g}" for s in runs[0]["stages"])),
            f"{runs[0]['updates']:,}",
            f"{runs[0]['flops']:.3g}",
            f"{mean(r['nats'] for r in runs):.4f}",
            ", ".join(f"{r['nats']:.4f}" for r in runs),
            f"{difference[0]:+.4f} ± {difference[1]:.4f}" if difference else "",
            verdict(*difference, plan.keys["margin"]) if difference else "",
            *(_mean_of(runs, key) + _paired(results, arm, baseline, key) for key in optional),
            f"{mean(r['cpu_seconds'] for r in runs):.0f}",
            *([_idle_seconds(runs[0], seconds)] if seconds else []),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _muon(plan: Plan) -> list[str]:
    """Return the section on Muon, empty before it was measured."""
    path = plan.results / MUON_FILE
    if not path.is_file():
        return []
    found = read_json(path)
    lines = [
        "\n## Muon\n",
        f"The settings are those of {found['settings_of']}, seed and data order included, in a bare loop. Muon updates "
        "the matrices of the layers, AdamW the rest.\n",
        "| optimizer | peak rate of Muon | nats | core seconds |",
        "|---|---|---|---|",
    ]
    for run in found["runs"]:
        rate = f"{run['muon_rate']:g}" if run["muon_rate"] else ""
        lines.append(f"| {run['name']} | {rate} | {run['nats']:.4f} | {run['cpu_seconds']:.0f} |")
    return lines


def _mean_of(runs: list[dict[str, Any]], key: str) -> str:
    values = [r[key] for r in runs if key in r]
    if not values:
        return ""
    return f"{mean(values):.1%}" if key == "class_agreement" else f"{mean(values):.4g}"


def _paired(results: Results, arm: str, baseline: str, key: str) -> str:
    found = compared(results, arm, baseline, key) if key in ("frechet_distance", "test_nats") else None
    return f" ({found[0]:+.3g} ± {found[1]:.2g})" if found else ""


def _idle_seconds(result: dict[str, Any], seconds: dict[str, float]) -> str:
    if any(key_of(stage) not in seconds for stage in result["stages"]):
        return ""
    return f"{sum(stage['steps'] * seconds[key_of(stage)] for stage in result['stages']):.0f}"


def _seconds_at(result: dict[str, Any], seconds: dict[str, float], step: int) -> float | None:
    """Return the seconds of an idle machine after a step, None if they were not measured."""
    total = 0.0
    for stage in result["stages"]:
        if key_of(stage) not in seconds:
            return None
        done = min(step, stage["steps"])
        total, step = total + done * seconds[key_of(stage)], step - done
    return total


def _plot(file: IO[bytes], plan: Plan, results: Results, arms: Sequence[str]) -> None:
    """Write a PNG of the mean loss at side 1 over FLOPs, and over seconds if they were measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seconds = read_seconds(plan)
    figure = Figure(figsize=(6.0 * (2 if seconds else 1), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if seconds else 1, squeeze=False)[0]
    for number, arm in enumerate(arms):
        runs = list(results[arm].values())
        curves = [[point["nats"] for point in run["curve"]] for run in runs]
        nats = [mean(values) for values in zip(*curves, strict=False)]
        points = runs[0]["curve"][: len(nats)]
        style = {
            "label": arm,
            "color": COLORS[number % len(COLORS)],
            "linestyle": ("-", "--", ":")[number // len(COLORS)],
        }
        axes[0].plot([p["flops"] for p in points], nats, marker="o", markersize=3, linewidth=1.2, **style)
        if seconds and (times := [_seconds_at(runs[0], seconds, p["step"]) for p in points]) and None not in times:
            axes[1].plot(times, nats, marker="o", markersize=3, linewidth=1.2, **style)
    for axis, name in zip(axes, ("FLOPs of training", "seconds of training on an idle core"), strict=False):
        axis.set_xlabel(name)
        axis.set_ylabel("nats per code at side 1")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e5e5", linewidth=1)
    axes[0].legend(frameon=False, fontsize=8)
    lowest = min(point["nats"] for arm in arms for run in results[arm].values() for point in run["curve"])
    for axis in axes:
        axis.set_ylim(lowest - 0.03, lowest + 0.6)
    figure.savefig(file, format="png", dpi=110)
