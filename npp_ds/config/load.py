"""Read a run's config from a recipe or file and key=value overrides, and report all its problems together."""

import re
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError

from npp_ds.config.schema import RECIPES, REPLACED_BY_STAGES, RunConfig, drop_replaced_by_stages, section_of
from npp_ds.errors import UserError
from npp_ds.utils.files import read_small

_RUN_FILES = ("checkpoints", "metrics.jsonl", "environment.json")  # what a run leaves beside its config.yaml
MOST_BYTES, MOST_LEVELS, MOST_VALUES = 1 << 20, 50, 10_000
"""Limits of a config file: its size, the depth of its nesting, the number of its values with aliases expanded."""
_SECTIONS = [name for name, field in RunConfig.model_fields.items() if hasattr(field.annotation, "model_fields")]


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_config(
    recipe: str | None = None,
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    world_size: int | None = None,
) -> RunConfig:
    """Return the checked config of a shipped recipe or a YAML file, with `a.b=value` overrides (values in YAML).

    Raises UserError that lists every problem: key, what was found, what is expected, what to do.
    """
    if recipe is not None and file is None:
        path = _recipe_path(recipe)
    elif file is not None and recipe is None:
        path = Path(file)
    else:
        raise UserError("give one of --recipe NAME and --config FILE; recipes: " + ", ".join(recipe_names()))
    raw, problems, given = _read_extended(path), [], set()
    for override in overrides:
        problems += _apply(raw, override)
        given.add(override.partition("=")[0])
    if "schedule.stages" in given:
        drop_replaced_by_stages(raw, keep=given)
    config, found, dropped = _parse(raw)
    problems += found
    if config is not None:
        problems += _replaced_problems(config, given)
        problems += [p for p in problems_of(config, world_size) if not _follows_from(p, dropped)]
    if config is None or problems:
        source = f"recipe {recipe}" if recipe else str(file)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{count} in the config ({source}):\n" + "\n".join(f"  - {p}" for p in problems))
    return config


def load_run(
    recipe: str | None = None,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    world_size: int | None = None,
) -> RunConfig:
    """Return the config of a run to start, as `load_config` does.

    Raises UserError also if `file` is in the folder of a run and the config names another folder: a run that was copied
    or moved would otherwise change its original. An override of run_dir decides which is meant.
    """
    config = load_config(recipe, file, overrides, world_size)
    if file is None or any(override.startswith("run_dir=") for override in overrides):
        return config
    folder = Path(file).parent
    if any((folder / name).exists() for name in _RUN_FILES) and folder.resolve() != config.directory.resolve():
        raise UserError(
            f"{file}: it is in the run folder {folder}, but its run_dir is {config.directory}; give run_dir={folder} "
            "to resume that copy, or another run_dir= for another run"
        )
    return config


def _recipe_path(name: str) -> Path:
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise UserError(
            f"recipe {name}: no such recipe{_hint(name, recipe_names())}; recipes: {', '.join(recipe_names())}"
        )
    return path


def _hint(found: str, known: Iterable[str]) -> str:
    close = get_close_matches(found, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the keys of a config file, unchecked. Raises UserError when it is unreadable or no YAML mapping."""
    try:
        raw = yaml.load(read_small(path, MOST_BYTES).decode(), _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give an existing YAML file") from error
    except _NOT_YAML as error:
        line = f"line {mark.line + 1}: " if (mark := getattr(error, "problem_mark", None)) else ""
        raise UserError(f"{path}: not valid YAML: {line}{_reason(error)}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds {type(raw).__name__}, expected keys such as model, data, schedule")
    return {str(key): {} if value is None and key in _SECTIONS else value for key, value in raw.items()}


class _Loader(yaml.SafeLoader):
    """Safe YAML without what reads as something else than it shows: keys given twice, numbers of base 8 or 60.

    Nesting and the number of values, with each alias counted as what it stands for, are limited: a file of ten lines
    can otherwise stand for a billion values, on which whatever copies, compares or prints them spends hours.
    """

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = 0
        self._values: dict[yaml.Node, int] = {}  # with those below it, by nodes that are complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        self._depth += 1
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index) if self._depth <= MOST_LEVELS else None
        self._depth -= 1
        if node is None or (is_alias and node not in self._values):
            what = f"nested more than {MOST_LEVELS} levels deep" if node is None else "an alias stands in what it names"
            raise ConstructorError(problem=what, problem_mark=mark)
        if not is_alias:
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            below = (part for item in parts for part in (item if isinstance(item, tuple) else (item,)))
            self._values[node] = 1 + sum(self._values[part] for part in below)
        if max(self._values[node], len(self._values)) > MOST_VALUES:
            raise ConstructorError(problem=f"more than {MOST_VALUES:,} values", problem_mark=mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise ConstructorError(problem=f"{key.value} is given twice; remove one", problem_mark=key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        is_int, text = node.tag.endswith(":int"), node.value
        if ":" in text or (is_int and re.fullmatch("[-+]?0[0-7_]+", text)):
            how = "a number of base 60; quote it" if ":" in text else "octal; write it without the zero, or quote it"
            raise ConstructorError(problem=f"{text} would be {how}", problem_mark=node.start_mark)
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)

# ValueError: a date that is none, bytes that are no UTF-8; RecursionError: thousands of brackets
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)


def _reason(error: Exception) -> str:
    return " ".join((getattr(error, "problem", None) or str(error)).split())


def _read_extended(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the keys of a file over those of the recipe that its key `extends` names."""
    raw = read_yaml(path)
    if path.name == "config.yaml" and path.with_name("environment.json").is_file():
        drop_replaced_by_stages(raw)  # a run's own file: it holds every key, and earlier versions allowed them
    name = raw.pop("extends", None)
    if name is None:
        return raw
    if path in seen:
        raise UserError(f"{path}: extends itself through {name}; drop one of these extends keys")
    base = _read_extended(_recipe_path(str(name)), (*seen, path))
    if isinstance(schedule := raw.get("schedule"), dict) and schedule.get("stages"):
        base["schedule"] = {k: v for k, v in (base.get("schedule") or {}).items() if k not in REPLACED_BY_STAGES}
    return _laid_over(base, raw)


def _laid_over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    both = {k: _laid_over(base[k], v) for k, v in top.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **top, **both}


def _apply(raw: dict[str, Any], override: str) -> list[str]:
    """Set one `a.b.0.c=value` in `raw`; return the problems with it."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return [f"{override}: expected key=value, such as optimizer.learning_rate=2e-4"]
    try:
        value = yaml.load(text, _Loader)
    except _NOT_YAML as error:
        return [f"{key}: {text!r} is not valid YAML ({_reason(error)}); quote strings that hold special characters"]
    *parents, last = key.split(".")
    node: Any = raw
    for name in parents:
        if isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, dict):
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        else:
            return [f"{key}: there is nothing to set at {name}"]
    if isinstance(node, list) and last.isdecimal() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        return [f"{key}: there is nothing to set at {last}"]
    return []


def _parse(raw: dict[str, Any]) -> tuple[RunConfig | None, list[str], list[str]]:
    """Return the config, the problems of single keys, and these keys, dropped so that the rest can be checked."""
    problems: list[str] = []
    dropped: list[str] = []
    for _ in range(2):
        try:
            return RunConfig.model_validate(raw), problems, dropped
        except ValidationError as error:
            found = [(".".join(map(str, item["loc"])), item) for item in error.errors()]
            problems += [_describe(item) for key, item in found if not any(key == d.split(".")[0] for d in dropped)]
            dropped += [key for key, _ in found]
            for _, item in found:
                _drop(raw, item["loc"])
    return None, problems, dropped


def _follows_from(problem: str, dropped: list[str]) -> bool:
    """Return whether a problem between keys stems from a key that was dropped because its own value is wrong."""
    key = problem.split(":")[0]
    return any(
        key == d
        or d.startswith(f"{key}.")
        or (key.startswith("schedule.patch_sides") and d.startswith("schedule.stages"))
        for d in dropped
    )


def _describe(item: ErrorDetails) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        return f"{key}: unknown key{_hint(str(item['loc'][-1]), known)}; known here: {', '.join(known)}"
    if item["type"] == "missing":
        return f"{key}: missing; set it in the file or as {key}=..."
    expected = item["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    found = repr(item["input"])
    found = found if len(found) <= 200 else f"{found[:200]}..."
    return f"{key}: found {found}, expected {expected}{_meaning(item['loc'])}"


def _section(location: tuple[str | int, ...]) -> type[BaseModel] | None:
    """Return the section class that holds the key at `location`."""
    section: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        if field is None:
            return None
        section = section_of(field.annotation)
        if section is None:
            return None
    return section


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    section = _section(location)
    return list(section.model_fields) if section else []


def _meaning(location: tuple[str | int, ...]) -> str:
    names = [part for part in location if isinstance(part, str)]
    section = _section(tuple(names[:-1]))
    field = section.model_fields.get(names[-1]) if section and names else None
    return f" ({field.description})" if field is not None and field.description else ""


def _drop(raw: Any, location: tuple[str | int, ...]) -> None:
    """Remove the wrong value; for an element of a list, remove the whole list."""
    cut = next((i for i, part in enumerate(location) if isinstance(part, int)), len(location))
    for part in location[: cut - 1]:
        raw = raw.get(part) if isinstance(raw, dict) else None
    if isinstance(raw, dict):
        raw.pop(location[cut - 1], None)


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
            f"model.dim: {dim} is no multiple of 4 x n_heads = {4 * heads}, which 2-D rotary positions need; "
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
            problems.append(f"{at}: side {side} does not cut a {grid}x{grid} grid evenly; use one of {divisors}")
    if any(a <= b for a, b in pairwise(sides)):
        problems.append(f"{key}: sides {sides} must fall from stage to stage, coarse to fine; sort them, use each once")
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
    for i, stage in enumerate(table):
        if stage.final_learning_rate > stage.learning_rate:
            problems.append(
                f"optimizer.final_learning_rate: {stage.final_learning_rate} is above the peak {stage.learning_rate} "
                f"of stage {i}; lower it"
            )
    return problems


def _replaced_problems(config: RunConfig, given: Collection[str]) -> list[str]:
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
    stages_of: dict[int, list[int]] = {}
    table = config.stage_table()
    for i, stage in enumerate(table):
        stages_of.setdefault(stage.batch_size, []).append(i)
    problems = []
    for batch_size, stages in stages_of.items():
        if batch_size % world_size:
            where = "every stage" if len(stages) == len(table) else f"stages {', '.join(map(str, stages))}"
            problems.append(
                f"schedule.batch_size: {batch_size} ({where}) is no multiple of {world_size} processes; use "
                f"{max(1, round(batch_size / world_size)) * world_size}, or another number of processes"
            )
    return problems


def _length_problems(config: RunConfig, num_samples: int) -> list[str]:
    problems = []
    for i, stage in enumerate(config.stage_table()):
        steps_per_epoch = num_samples // stage.batch_size
        if steps_per_epoch == 0:
            problems.append(
                f"schedule.batch_size: {stage.batch_size} exceeds the {num_samples} training images; lower it"
            )
            continue
        steps, warmup = stage.length(steps_per_epoch), stage.warmup_steps(steps_per_epoch)
        if steps == 0:
            problems.append(
                f"schedule: stage {i} lasts {stage.epochs} epochs of {steps_per_epoch}: no step at all; lengthen it"
            )
        elif warmup > steps:
            problems.append(
                f"schedule.warmup_epochs: {stage.warmup_epochs} ({warmup} steps) exceeds stage {i} of {steps}; lower it"
            )
    return problems


def _profile_problems(config: RunConfig, num_samples: int) -> list[str]:
    last = config.build_schedule(num_samples).total_steps
    if not config.profile.steps or config.profile.numbers()[-1] <= last:
        return []
    return [
        f"profile.steps: {config.profile.steps}, but the run ends with step {last}; name earlier steps, or use null"
    ]
