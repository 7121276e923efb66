"""Read a run's config from a recipe or file and key=value overrides, and report all its problems together."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError

from npp_ds.config.checks import problems_of, replaced_problems
from npp_ds.config.fields import keys_of
from npp_ds.config.schema import RECIPES, REPLACED_BY_STAGES, RunConfig, drop_replaced_by_stages
from npp_ds.errors import UserError, did_you_mean, similar_names
from npp_ds.utils.files import read_small
from npp_ds.utils.format import counted

_RUN_FILES = ("checkpoints", "metrics.jsonl", "environment.json")  # what a run leaves beside its config.yaml
MOST_BYTES, MOST_LEVELS, MOST_VALUES = 1 << 20, 50, 10_000
"""Limits of a config file: its size, the depth of its nesting, the number of its values with aliases expanded."""
_SECTIONS = [name for name, field in RunConfig.model_fields.items() if hasattr(field.annotation, "model_fields")]
_FIELDS = dict(keys_of(RunConfig))


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
        problems += replaced_problems(config, given)
        problems += [p for p in problems_of(config, world_size) if not _follows_from(p, dropped)]
    if config is None or problems:
        source = f"recipe {recipe}" if recipe else str(file)
        problems = list(dict.fromkeys(problems))
        count = counted(len(problems), "problem")
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
        known = recipe_names()
        hint = did_you_mean(similar_names(name, known))
        raise UserError(f"recipe {name}: no such recipe{hint}; recipes: {', '.join(known)}")
    return path


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
    """A safe YAML loader that rejects ambiguous input: duplicate keys, octal and base-60 numbers.

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
            too_deep = f"nested more than {MOST_LEVELS} levels deep"
            what = too_deep if node is None else "a YAML alias refers to a node that contains it"
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
    if not text.strip():
        return [f"{override}: no value, as of a variable that is not set; {key}=null means none"]
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
    key = ".".join(map(str, item["loc"]))
    generic = ".".join("N" if isinstance(part, int) else part for part in item["loc"])  # as `keys_of` names it
    section = generic.rpartition(".")[0]
    if item["type"] == "extra_forbidden":
        known = [name.rpartition(".")[2] for name in _FIELDS if name.rpartition(".")[0] == section]
        return f"{key}: unknown key{did_you_mean(_similar_keys(key, known))}; known here: {', '.join(known)}"
    if item["type"] == "missing":
        return f"{key}: missing; set it in the file or as {key}=..."
    expected = item["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    found = repr(item["input"])
    found = found if len(found) <= 200 else f"{found[:200]}..."
    field = _FIELDS.get(generic.removesuffix(".N"))
    meaning = f" ({field.description})" if field and field.description else ""
    hint = did_you_mean(similar_names(str(item["input"])[:200], re.findall("'([^']+)'", expected)))
    return f"{key}: found {found}, expected {expected}{meaning}{hint}"


def _similar_keys(key: str, known: list[str]) -> list[str]:
    """Return the keys that `key` may stand for: of its own section, where they are `known`, else of any section."""
    section, dot, name = key.rpartition(".")
    if here := similar_names(name, known):
        return [f"{section}{dot}{other}" for other in here]
    names = {other.rpartition(".")[2] for other in _FIELDS}
    close = names & {name} or set(similar_names(name, sorted(names), most=1))
    return sorted((other for other in _FIELDS if other.rpartition(".")[2] in close), key=len)[:2]


def _drop(raw: Any, location: tuple[str | int, ...]) -> None:
    """Remove the wrong value; for an element of a list, remove the whole list."""
    cut = next((i for i, part in enumerate(location) if isinstance(part, int)), len(location))
    for part in location[: cut - 1]:
        raw = raw.get(part) if isinstance(raw, dict) else None
    if isinstance(raw, dict):
        raw.pop(location[cut - 1], None)
