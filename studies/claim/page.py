"""The page of the study, made from its results alone: tables with paired intervals, curves, samples, and statements."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from shutil import copyfile
from statistics import mean, stdev
from typing import IO, Any

from npp_ds.utils.files import write_atomic, write_text_atomic
from studies.claim.data import DATA_FILE
from studies.claim.muon import MUON_FILE
from studies.claim.plan import DATA, MUON, PLAN, SECONDS, Plan
from studies.claim.seconds import key_of, load_of, read_seconds, timed_stages

SIDE_BY_SIDE = 2
STUDENT_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)  # of 1, 2, .. degrees of freedom
COLORS = ("#4878a8", "#d1773a", "#5a9a5a", "#8d6aa8", "#b0413e", "#6b6b6b")
PLANNED = (  # with the two arms whose difference decides; {chosen} is the arm that the first one takes its keys from
    ("A, the paper's recipe: equal epochs, no worse than next-token training", "paper-confirmed", "next-best"),
    ("A, {chosen}: equal epochs, no worse than next-token training", "npp-best-epochs", "next-best"),
    ("B, {chosen}: equal FLOPs, better than next-token training", "npp-best-flops", "next-best"),
)
ADDED = (
    (
        "The paper's recipe: better than next-token training that ends at the same FLOPs",
        "paper-confirmed",
        "next-short",
    ),
    ("The paper's recipe, equal FLOPs: better than next-token training", "paper-flops", "next-best"),
    ("{chosen}, equal FLOPs: better than the paper's recipe", "npp-best-flops", "paper-flops"),
    ("{chosen}, equal FLOPs: better than the same without centers", "npp-best-flops", "sides-4-2-1-flops"),
    ("centers-flops: better than next-token training without dropout", "centers-flops", "next-no-dropout"),
    ("centers-flops-no-dropout: better than the same", "centers-flops-no-dropout", "next-no-dropout"),
    ("superposition: better than the same", "superposition", "next-no-dropout"),
)
SEEDS = 3  # with fewer an answer is not given
HEAD = """# Does next patch prediction help? A study on small natural images

Next patch prediction trains on patches of codes first and on single codes last; next-token training on single codes
from the start. Two questions. **A**, the paper's claim: with equal epochs, at about 0.6 of the FLOPs, next patch
prediction is no worse than next-token training. **B**: with equal FLOPs it is better. Next-token training is tuned
first.

The plan, `studies/claim/{plan}`, was fixed before the first run. Models have {n_layers} layers of width {dim} and
train on {train:,} images of {image_size}x{image_size} pixels, as {grid_size}x{grid_size} codes. Losses are nats per
code, predicted one by one (patch side 1), on {validation:,} validation images; in part 4 and later the test images
decide. Differences are paired by seed, "±" is half of their 95 % t interval over the seeds, and negative is better.
"Better" and "worse" mean that the interval excludes 0, "no worse" that it ends below {margin} nats, "undecided" none
of these: it says that more seeds are needed, not that two runs are equal. The loss decides; the Frechet distance is
reported beside it.

{features} Class agreement is the share of samples that the classifier puts into the class they were made for. Each run
has its own guidance scale, the one with the lowest distance in {sweep_images:,} samples of another sampling seed;
figures are of {images:,} samples.
"""
OF_A_CLASSIFIER = (
    "Frechet distances use the features of a small classifier and compare with no published FID. Their reference is "
    "all training images, so a model that repeats those it trained on is not punished."
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
        return "worse, by less than the margin" if difference + half < margin else "worse"
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


def differences(results: Results, arm: str, baseline: str, key: str) -> list[float]:
    """Return the differences between two arms, one for each seed that both have."""
    a, b = results.get(arm, {}), results.get(baseline, {})
    return [a[seed][key] - b[seed][key] for seed in sorted(a.keys() & b.keys()) if key in a[seed] and key in b[seed]]


def write_page(plan: Plan, path: Path) -> None:
    """Write the page, and its pictures to images/ beside it."""
    results, keys = results_of(plan), plan.keys
    features = OF_A_CLASSIFIER if plan.classifier else OF_INCEPTION
    names = {
        **keys["data"],
        **keys["model"],
        **keys["samples"],
        "margin": keys["margin"],
        "plan": plan.path.name,
        "features": features,
    }
    text = [HEAD.format(**names), "## What holds\n", *_statements(plan, results, PLANNED)]
    if added := _statements(plan, results, ADDED):
        text += [
            "\nCompared as well; the plan did not ask for it, and of so many intervals one may exclude 0 by chance:\n",
            *added,
        ]
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
        arms = [arm for arm in _shown(part) if results.get(arm, {}).keys() & set(part["seeds"])]
        write_atomic(picture, partial(_plot, plan=plan, results=results, arms=arms, seeds=part["seeds"]))
        text.append(f"\n![Loss over the course of training](images/{picture.name})\n")
        text.append(
            "Mean and range of the seeds. Each run ends with a low rate, which lowers the loss: compare curves at "
            "their ends."
        )
        text += _samples(plan, number, arms, picture.parent, path.stem)
    text += [*_data(plan), *_muon(plan)]
    text += _commands(plan, path)
    text += ["", _hardware(plan, results)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, "\n".join(text) + "\n")


def _commands(plan: Plan, page: Path) -> list[str]:
    command = "python -m studies.claim --results study/results"
    command += f" --plan studies/claim/{plan.path.name}" if plan.path != PLAN else ""
    return [
        "\n## Commands\n",
        "Each resumes when it is run again, and skips runs that have a result.\n",
        "```",
        *(f"{command} --images IMAGES --out study --part {part}" for part in (*plan.parts, MUON, DATA)),
        f"{command} --images IMAGES --out study --part {SECONDS}    # on an idle machine",
        f"{command} --page study/{page.name}",
        "npp report study/runs/2-*-seed1 --out study/report.html    # curves, settings and hardware of these runs",
        "```",
    ]


def _hardware(plan: Plan, results: Results) -> str:
    found = [result for of_arm in results.values() for result in of_arm.values()]
    machines = sorted({f"{r['machine']}, torch {r['torch']}" for r in found})
    hours = {n: sum(r["cpu_seconds"] for r in found if r["part"] == n) / 3600 for n in plan.parts}
    load = load_of(plan)
    return (
        f"Made on: {'; '.join(machines) or 'nothing yet'}. Core hours of training: "
        + ", ".join(f"part {n} {h:.1f}" for n, h in hours.items() if h)
        + ". Core seconds are processor time, which a busy machine makes longer; seconds on an idle core are the steps "
        "of a run times what `--part seconds` measured for one"
        + ("." if load is None else f", at a load average of {load:.1f}.")
    )


def _samples(plan: Plan, number: int, arms: Sequence[str], folder: Path, page: str) -> list[str]:
    """Copy the first samples of the arms to `folder`; return a table that shows them side by side."""
    seed, shown = plan.parts[number]["seeds"][0], {}
    for arm in arms:
        if (samples := plan.results / f"{plan.part_of[arm]}-{arm}-seed{seed}.png").is_file():
            shown[arm] = folder / f"{page}_samples_{arm}.png"
            copyfile(samples, shown[arm])
    if not shown:
        return []
    pictures = [f"![samples of {arm}](images/{file.name})" for arm, file in shown.items()]
    lines = [f"\nSamples with seed {seed}, the classes in turn from left to right:\n"]
    for row in range(0, len(shown), SIDE_BY_SIDE):
        cells = list(shown)[row : row + SIDE_BY_SIDE], pictures[row : row + SIDE_BY_SIDE]
        lines += [f"| {' | '.join(cells[0])} |", "|" + "---|" * len(cells[0]), f"| {' | '.join(cells[1])} |", ""]
    return lines[:-1]


def _statements(plan: Plan, results: Results, questions: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return a line for each question about two arms of the plan, with its answer once enough seeds are there."""
    lines = []
    for question, arm, baseline in questions:
        if arm not in plan.part_of or baseline not in plan.part_of:
            continue
        part = max(plan.part_of[arm], plan.part_of[baseline])
        asked = question.format(chosen=plan.chosen(arm) or "the best variation")
        key, images = plan.judged_by(part)
        pairs = differences(results, arm, baseline, key)
        if len(pairs) < max(SEEDS, len(plan.parts[part]["seeds"])):
            lines.append(f"- {asked}: not decided yet; part {part} decides.")
            continue
        difference, half = interval(pairs)
        line = f"- {asked}: **{verdict(difference, half, plan.keys['margin'])}** "
        line += f"({difference:+.4f} ± {half:.4f} nats on {images} images"
        if distances := differences(results, arm, baseline, "frechet_distance"):
            line += "; Frechet distance {:+.1f} ± {:.1f}".format(*interval(distances))
        lines.append(line + ").")
    return lines


def _shown(part: dict[str, Any]) -> list[str]:
    """Return the arms that a part shows: its baseline, arms of other parts to compare with, and its own."""
    baseline = [part["baseline"]] if "baseline" in part else []
    return list(dict.fromkeys([*baseline, *part.get("beside", ()), *part["arms"]]))


def _table(plan: Plan, results: Results, number: int) -> list[str]:
    part = plan.parts[number]
    key, images = plan.judged_by(number)
    next_flops = plan.keys["training"]["epochs"] * plan.keys["data"]["train"] * plan.flops_per_image(1)
    with_samples, seconds = part.get("samples", True), read_seconds(plan)
    columns = ["arm", "keys of", "batch", "peak rate", "updates", "FLOPs, relative"]
    columns += [f"nats, {images} images", "by seed", "difference", "so it is"]
    columns += ["Frechet distance", "class agreement"] if with_samples else []
    columns += ["core seconds", *(["seconds, idle core"] if seconds else [])]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for arm in _shown(part):
        of_arm = results.get(arm, {})
        runs = [of_arm[seed] for seed in part["seeds"] if seed in of_arm]
        if not runs:
            continue
        cells = [
            arm,
            runs[0]["chosen"] or "",
            ", ".join(dict.fromkeys(str(s["batch_size"]) for s in runs[0]["stages"])),
            ", ".join(dict.fromkeys(f"{s['learning_rate']:g}" for s in runs[0]["stages"])),
            f"{runs[0]['updates']:,}",
            f"{runs[0]['flops'] / next_flops:.2f}",
            f"{mean(r[key] for r in runs):.4f}",
            ", ".join(f"{r[key]:.4f}" for r in runs),
            *_difference(results, arm, part, key, plan.keys["margin"]),
        ]
        if with_samples:
            distance = _difference(results, arm, part, "frechet_distance", 0, "+.1f")[0]
            cells.append(f"{mean(r['frechet_distance'] for r in runs):.1f}" + (f" ({distance})" if distance else ""))
            agreement = [r["class_agreement"] for r in runs if "class_agreement" in r]
            cells.append(f"{mean(agreement):.1%}" if agreement else "")
        cells.append(f"{mean(r['cpu_seconds'] for r in runs):.0f}")
        cells += [_idle_seconds(plan, runs[0], seconds)] if seconds else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _difference(
    results: Results, arm: str, part: dict[str, Any], key: str, margin: float, form: str = "+.4f"
) -> tuple[str, str]:
    """Return the difference from a part's baseline, with interval and verdict where it has several seeds."""
    pairs = differences(results, arm, part.get("baseline", ""), key)
    if not pairs or arm == part.get("baseline"):
        return "", ""
    if len(pairs) == 1:
        return f"{pairs[0]:{form}}", ""
    difference, half = interval(pairs)
    return f"{difference:{form}} ± {half:{form[1:]}}", verdict(difference, half, margin)


def _data(plan: Plan) -> list[str]:
    """Return the section on what quality is possible, empty before it was measured."""
    if (found := plan.recorded(DATA_FILE)) is None:
        return []
    lines = [
        "\n## What is possible\n",
        f"{found['images']:,} test images, measured as samples are. The best that a model of these codes can do is "
        f"to make images like their reconstructions. They use {found['codes_used']:.0%} of the codes.\n",
        "| | Frechet distance | class agreement |",
        "|---|---|---|",
    ]
    for name in ("test images", "their reconstructions"):
        agreement = f"{found[name]['class_agreement']:.1%}" if "class_agreement" in found[name] else ""
        lines.append(f"| {name} | {found[name]['frechet_distance']:.1f} | {agreement} |")
    return lines


def _muon(plan: Plan) -> list[str]:
    """Return the section on Muon, empty before it was measured."""
    if (found := plan.recorded(MUON_FILE)) is None:
        return []
    lines = [
        "\n## Muon\n",
        f"The settings are those of {found['settings_of']}, seed and data order included, in a plain PyTorch loop. "
        "Muon updates the matrices of the layers, AdamW the rest.\n",
        "| optimizer | peak rate of Muon | nats | core seconds |",
        "|---|---|---|---|",
    ]
    for run in found["runs"]:
        rate = f"{run['muon_rate']:g}" if run["muon_rate"] else ""
        lines.append(f"| {run['name']} | {rate} | {run['nats']:.4f} | {run['cpu_seconds']:.0f} |")
    return lines


def _idle_seconds(plan: Plan, result: dict[str, Any], seconds: dict[str, float]) -> str:
    total = _seconds_at(plan, result, seconds, result["updates"])
    return "" if total is None else f"{total:.0f}"


def _seconds_at(plan: Plan, result: dict[str, Any], seconds: dict[str, float], step: int) -> float | None:
    """Return the seconds of an idle machine after a step, None if they were not measured."""
    total = 0.0
    for stage in timed_stages(plan, result):
        if key_of(stage) not in seconds:
            return None
        done = min(step, stage["steps"])
        total, step = total + done * seconds[key_of(stage)], step - done
    return total


def _plot(file: IO[bytes], plan: Plan, results: Results, arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Write a PNG of the mean loss at side 1 with its range over FLOPs, and over seconds if they were measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seconds = read_seconds(plan)
    figure = Figure(figsize=(6.0 * (2 if seconds else 1), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if seconds else 1, squeeze=False)[0]
    for number, arm in enumerate(arms):
        runs = [run for seed, run in results[arm].items() if seed in seeds]
        curves = [[point["nats"] for point in run["curve"]] for run in runs]
        by_point = list(zip(*curves, strict=True))
        nats, points = list(map(mean, by_point)), runs[0]["curve"]
        flops = [p["flops"] for p in points]
        style = {
            "label": arm,
            "color": COLORS[number % len(COLORS)],
            "linestyle": ("-", "--", ":")[number // len(COLORS)],
        }
        axes[0].fill_between(
            flops, list(map(min, by_point)), list(map(max, by_point)), color=style["color"], alpha=0.15
        )
        axes[0].plot(flops, nats, marker="o", markersize=3, linewidth=1.2, **style)
        if (
            seconds
            and (times := [_seconds_at(plan, runs[0], seconds, p["step"]) for p in points])
            and None not in times
        ):
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
