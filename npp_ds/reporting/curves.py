"""The curves of a report's page: few points per curve, and where each step lies on the axes that one can choose."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np

from npp_ds.reporting.summary import RunData
from npp_ds.training.metrics import Event, events_named
from npp_ds.training.throughput import step_flops

MOST_POINTS = 150
"""Most points of a curve in one stage; with more lines, each stands for a bin of equally many."""
TIME_UNITS = ((180, 1, "seconds"), (7200, 60, "minutes"), (float("inf"), 3600, "hours"))
FLOP_UNITS = {1e12: "TFLOPs", 1e15: "PFLOPs", 1e18: "EFLOPs", 1e21: "ZFLOPs", 1e24: "YFLOPs"}


@dataclass(frozen=True)
class Curve:
    """A curve of run number `run`; `parts` hold points [step, value], or [step, mean, least, largest] of a bin.

    `look` is "line", "dots" (a line with a dot at each point), "dashes" or "marks" (no line).
    """

    run: int
    name: str
    look: str
    parts: list[list[list[float]]]


@dataclass(frozen=True)
class Panel:
    """Curves with one vertical axis, which begins at zero if `from_zero`."""

    key: str
    title: str
    curves: list[Curve]
    from_zero: bool = False


def _rounded(values: Iterable[float], digits: int = 5) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]


def binned(lines: Sequence[Event], name: str) -> list[list[float]]:
    """Return at most MOST_POINTS points of a figure; lines without it, or where it is not finite, are left out."""
    known = [(e["step"], e[name]) for e in lines if e.get(name) is not None and isfinite(e[name])]
    bins = np.array_split(np.array(known, np.float64).reshape(-1, 2), min(MOST_POINTS, max(1, len(known))))
    if len(bins) == len(known):
        return [[int(step), *_rounded([value])] for step, value in known]
    return [[round(b[:, 0].mean()), *_rounded([b[:, 1].mean(), b[:, 1].min(), b[:, 1].max()])] for b in bins if len(b)]


def axis_knots(run: RunData) -> np.ndarray:
    """Return float64 [knots, 4] of step, epochs, FLOPs and seconds of training, between which all grow linearly.

    FLOPs are those of the model for all images (`npp_ds.sizes.training_flops`), of all processes together.
    """
    stages, model = run.schedule.stages, run.config.model
    flops = [s.steps * step_flops(model, s, s.patch_side) for s in stages]
    ends = [0, *(s.end_step for s in stages)]
    lines = run.lines
    spaced = lines[:: max(1, len(lines) // MOST_POINTS)]
    last = lines[-1]["step"]
    steps = np.array(sorted({*(end for end in ends if end <= last), *(e["step"] for e in spaced), last}), np.float64)
    seconds = np.interp(steps, [0, *(e["step"] for e in lines)], [0, *(e["elapsed_seconds"] for e in lines)])
    epochs = np.interp(steps, ends, np.cumsum([0.0, *(s.steps / s.steps_per_epoch for s in stages)]))
    return np.stack([steps, epochs, np.interp(steps, ends, np.cumsum([0.0, *flops])), seconds], axis=1)


def _by_stage(run: RunData, name: str) -> list[list[list[float]]]:
    parts = (binned(lines, name) for lines in run.lines_by_stage)
    return [part for part in parts if part]


def _points(events: list[Event], name: str, at_side_1: bool) -> list[list[list[float]]]:
    points = binned([e for e in events if (e["patch_side"] == 1) == at_side_1], name)
    return [points] if points else []


def panels(runs: Sequence[RunData], names: Sequence[str]) -> list[Panel]:
    """Return the panels that have a curve; with several runs each curve has the name of its run."""

    def panel(key: str, title: str, *kinds: tuple[str, str, Any], from_zero: bool = False) -> Panel:
        curves = []
        for number, (run, name) in enumerate(zip(runs, names, strict=True)):
            for what, look, parts_of in kinds:
                called = what if len(runs) == 1 else f"{name}, {what}" if len(kinds) > 1 else name
                if parts := parts_of(run):
                    curves.append(Curve(number, called, look, parts))
        return Panel(key, title, curves, from_zero)

    def points(event: str, name: str, at_side_1: bool) -> Any:
        return lambda run: _points(events_named(run.events, event), name, at_side_1)

    def trained(name: str) -> Any:
        return lambda run: _by_stage(run, name)

    found = [
        panel(
            "validation",
            "Validation, nats per code",
            ("at patch side 1", "dots", points("validation", "nll", True)),
            ("at the stage's patch side", "marks", points("validation", "nll", False)),
            ("moving average, at patch side 1", "dashes", points("validation_ema", "nll", True)),
        ),
        panel("loss", "Training loss, nats per code", ("at the stage's patch side", "line", trained("loss"))),
        panel(
            "evaluation",
            "Frechet distance of samples",
            ("at patch side 1", "dots", points("evaluation", "frechet_distance", True)),
            ("at the stage's patch side", "marks", points("evaluation", "frechet_distance", False)),
            from_zero=True,
        ),
        panel("rate", "Learning rate", ("learning rate", "line", trained("learning_rate")), from_zero=True),
        panel("speed", "Images per second", ("images", "line", trained("images_per_second")), from_zero=True),
        panel("gradients", "Norm of the gradients", ("before clipping", "line", trained("grad_norm")), from_zero=True),
        panel("mfu", "MFU", ("of the GPU's peak", "line", trained("mfu")), from_zero=True),
    ]
    return [one for one in found if one.curves]


def plot_data(runs: Sequence[RunData], shown: Sequence[Panel]) -> dict[str, Any]:
    """Return all that the page's script draws, as JSON values: axes, runs and panels."""
    knots = [axis_knots(run) for run in runs]
    flops, seconds = (max(k[-1, column] for k in knots) for column in (2, 3))
    flop_unit = max((unit for unit in FLOP_UNITS if unit <= flops), default=min(FLOP_UNITS))
    second_unit, time_name = next((unit, name) for most, unit, name in TIME_UNITS if seconds < most)
    scale = np.array([1.0, 1.0, flop_unit, second_unit])
    return {
        "axes": ["step", "epoch", FLOP_UNITS[flop_unit], f"{time_name} of training"],
        "runs": [
            {
                "knots": [_rounded(row, 8) for row in k / scale],
                "stages": [[s.start_step, s.end_step, s.patch_side] for s in run.schedule.stages],
            }
            for run, k in zip(runs, knots, strict=True)
        ],
        "panels": [asdict(panel) for panel in shown],
    }
