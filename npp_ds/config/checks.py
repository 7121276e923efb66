"""Problems between the keys of a config, and between it, the number of processes and the training images."""

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from npp_ds.config.schema import REPLACED_BY_STAGES, RunConfig


def problems_of(config: RunConfig, world_size: int | None = None, num_samples: int | None = None) -> list[str]:
    """Return the problems between the keys of a config, and between it, the number of processes and the data."""
    problems = _model_problems(config) + _stage_problems(config) + _average_problems(config)
    problems += _evaluate_problems(config)
    if world_size is not None:
        problems += _batch_problems(config, world_size)
    if num_samples is not None and not problems:
        problems += _length_problems(config, num_samples) or _profile_problems(config, num_samples)
    return problems


def _model_problems(config: RunConfig) -> list[str]:
    m, problems = config.model, []
    given = {k: getattr(m, k) for k in ("dim", "n_layers", "n_heads")}
    if m.size and any(v is not None for v in given.values()):
        extra = ", ".join(f"model.{k}" for k, v in given.items() if v is not None)
        problems.append(
            f"model.size: {m.size} fixes dim, n_layers and n_heads, found also {extra}; set size to null or drop them"
        )
    if not m.size and (missing := [k for k, v in given.items() if v is None]):
        problems.append(f"model: {', '.join(missing)} missing; set them, or model.size to one of the published sizes")
    if problems:
        return problems
    dim, heads = m.shape()["dim"], m.shape()["n_heads"]
    if dim % (4 * heads):
        problems.append(
            f"model.dim: {dim} is not a multiple of 4 x n_heads = {4 * heads}, which 2-D rotary positions need; "
            f"try dim {max(1, round(dim / (4 * heads))) * 4 * heads}"
        )
    if m.n_kv_heads and heads % m.n_kv_heads:
        problems.append(f"model.n_kv_heads: {m.n_kv_heads} does not divide n_heads {heads}; use a divisor")
    return problems


def _stage_problems(config: RunConfig) -> list[str]:
    s, grid, problems = config.schedule, config.model.grid_size, []
    key = "schedule.patch_sides" if s.stages is None else "schedule.stages"
    for i, section in enumerate(s.stages or []):
        if (section.epochs is None) == (section.steps is None):
            found = "both" if section.steps else "neither"
            problems.append(f"schedule.stages.{i}: {found} of epochs and steps given; give exactly one")
    table = config.stage_table()
    sides = [stage.patch_side for stage in table]
    divisors = [d for d in range(1, grid + 1) if grid % d == 0]
    for i, side in enumerate(sides):
        if side not in divisors:
            at = f"{key}.{i}" + (".patch_side" if s.stages else "")
            problems.append(f"{at}: side {side} does not divide the {grid}x{grid} grid; use one of {divisors}")
    if any(a <= b for a, b in pairwise(sides)):
        problems.append(
            f"{key}: sides {sides} must decrease from stage to stage, coarse to fine; sort them, use each once"
        )
    if sides[-1] != 1 and s.end_at_patch_side_one:
        problems.append(
            f"{key}: the last stage has side {sides[-1]}, so the model would never learn plain tokens; "
            "end with side 1, or set schedule.end_at_patch_side_one=false"
        )
    if s.stages is None:
        for i, stage in enumerate(table):
            if stage.epochs == 0:
                problems.append(
                    f"schedule.epochs: {s.epochs} epochs over {len(sides)} stages at ratio {s.ratio} leave stage {i} "
                    f"(side {stage.patch_side}) empty; use more epochs, fewer patch_sides or a larger ratio"
                )
    if s.stages is not None and s.coarse_batch_scale > 1:
        problems.append(
            f"schedule.coarse_batch_scale: {s.coarse_batch_scale} has no effect on listed stages; give these "
            "batch_size and learning_rate of their own, or drop schedule.stages"
        )
    o = config.optimizer
    for name, beta in zip(("first", "second"), o.betas, strict=True):
        if not 0 <= beta < 1:
            problems.append(f"optimizer.betas: the {name} is {beta}, expected at least 0 and below 1")
    for (final, peak), where in _grouped([(s.final_learning_rate, s.learning_rate) for s in table]).items():
        if final > peak:
            problems.append(f"optimizer.final_learning_rate: {final} is above the peak {peak} of {where}; lower it")
    return problems


def replaced_problems(config: RunConfig, given: Collection[str]) -> list[str]:
    """Return problems with keys that listed stages replace: `given` on the command line, or not at their defaults."""
    schedule, problems = config.schedule, []
    for name in REPLACED_BY_STAGES if schedule.stages is not None else ():
        value, default = getattr(schedule, name), type(schedule).model_fields[name].default
        if value != default or f"schedule.{name}" in given:
            instead = "patch_side" if name == "patch_sides" else "epochs"
            problems.append(
                f"schedule.{name}: {value} has no effect on listed stages; change schedule.stages.N.{instead} instead, "
                "or set schedule.stages=null"
            )
    return problems


def _average_problems(config: RunConfig) -> list[str]:
    wanted = {"validation": config.validation.weights, "evaluate": config.evaluate.weights}
    return [
        f"{section}.weights: {kind}, but optimizer.ema_decay is 0, so no average is kept; "
        f"set optimizer.ema_decay (such as 0.9999), or {section}.weights to raw"
        for section, kind in wanted.items()
        if kind != "raw" and not config.optimizer.ema_decay
    ]


def _evaluate_problems(config: RunConfig) -> list[str]:
    if not config.evaluate.every:
        return []
    problems = []
    if not config.evaluate.reference:
        problems.append(
            "evaluate.reference: missing, but evaluate.every asks for evaluations; name statistics of real images "
            "(`npp evaluate --make-reference`), or set evaluate.every to 0"
        )
    if config.evaluate.cfg_scale != 1 and not config.data.class_dropout and config.init_from is None:
        problems.append(
            f"evaluate.cfg_scale: {config.evaluate.cfg_scale:g}, but data.class_dropout is 0, so no null class is "
            "trained to guide with; set evaluate.cfg_scale to 1, or data.class_dropout (such as 0.1)"
        )
    return problems


def _batch_problems(config: RunConfig, world_size: int) -> list[str]:
    return [
        f"schedule.batch_size: {batch_size} ({where}) is not a multiple of {world_size} processes; use "
        f"{max(1, round(batch_size / world_size)) * world_size}, or another number of processes"
        for batch_size, where in _grouped([stage.batch_size for stage in config.stage_table()]).items()
        if batch_size % world_size
    ]


def _length_problems(config: RunConfig, num_samples: int) -> list[str]:
    table, lengths = config.stage_table(), []
    problems = [
        f"schedule.batch_size: {batch_size} ({where}) exceeds the {num_samples} training images; lower it"
        for batch_size, where in _grouped([stage.batch_size for stage in table]).items()
        if batch_size > num_samples
    ]
    for stage in table:
        steps_per_epoch = max(1, num_samples // stage.batch_size)
        steps, warmup = stage.length(steps_per_epoch), stage.warmup_steps(steps_per_epoch)
        lengths.append((stage.batch_size, stage.epochs, stage.warmup_epochs, steps, warmup))
    for (batch_size, epochs, warmup_epochs, steps, warmup), where in _grouped(lengths).items():
        if batch_size > num_samples:
            continue
        if steps == 0:
            problems.append(
                f"schedule: {epochs} epochs of {num_samples // batch_size} steps ({where}) are less than one step; "
                "use more"
            )
        elif warmup > steps:
            problems.append(
                f"schedule.warmup_epochs: {warmup_epochs} ({warmup} steps) exceeds the {steps} of {where}; lower it"
            )
    return problems


def _grouped(values: Sequence[Any]) -> dict[Any, str]:
    """Return the different values of the stages, each with the stages that have it: stage 0, stages 0 and 2, .."""
    stages_of: dict[Any, list[str]] = {}
    for i, value in enumerate(values):
        stages_of.setdefault(value, []).append(str(i))

    def text(stages: list[str]) -> str:
        *others, last = stages
        several = f"stages {', '.join(others)} and {last}" if others else f"stage {last}"
        return "every stage" if len(stages) == len(values) else several

    return {value: text(stages) for value, stages in stages_of.items()}


def _profile_problems(config: RunConfig, num_samples: int) -> list[str]:
    last = config.build_schedule(num_samples).total_steps
    if not config.profile.steps or config.profile.numbers()[-1] <= last:
        return []
    return [
        f"profile.steps: {config.profile.steps}, but the run ends with step {last}; name earlier steps, or use null"
    ]
