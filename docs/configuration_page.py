"""Print docs/configuration.md, the reference of all config keys: `python docs/configuration_page.py`."""

import inspect
import json
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from npp_ds.config.fields import may_change_on_resume, section_of
from npp_ds.config.schema import RunConfig

INTRODUCTION = """\
# Configuration

All keys of a run, as the schema describes them (`npp_ds/config/schema.py`; a test compares this page with it).

A run reads them from a shipped recipe (`--recipe NAME`; `npp recipes` lists them) or from a YAML file (`--config
FILE`). A file may begin with `extends: RECIPE` and then holds only what differs. `key=value` on the command line takes
precedence, with values in YAML:

```bash
npp train --recipe b_256 name=mine optimizer.learning_rate=2e-4 'schedule.patch_sides=[4,2,1]' validation.limit=null
npp train --config my.yaml schedule.stages.0.epochs=2
npp recipes show b_256 > my.yaml      # every key, to start a file from
```

All problems of a config are reported together, before anything starts. The run folder's `config.yaml` holds every
key, resolved. A key with a *yes* under *resume* may have another value when a run is resumed; for the others a restart
is refused, because the run would no longer be what it was. `null` means that the key is not set.
"""

BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}", "min_length": "not empty"}


def reference() -> str:
    """Return the page in Markdown."""
    fields = RunConfig.model_fields
    sections = {name: inner for name, field in fields.items() if (inner := section_of(field.annotation))}
    top = {name: field for name, field in fields.items() if name not in sections}
    parts = [INTRODUCTION, _part("The run", None, "", top)]
    for name, section in sections.items():
        changeable = may_change_on_resume(fields[name])
        parts.append(_part(f"`{name}`", section, f"{name}.", section.model_fields, changeable))
        for key, field in section.model_fields.items():
            if inner := section_of(field.annotation):
                parts.append(_part(f"`{name}.{key}`", inner, f"{name}.{key}.N.", inner.model_fields, changeable))
    return "\n".join(parts)


def _part(
    title: str, section: type[BaseModel] | None, prefix: str, fields: dict[str, FieldInfo], changeable: bool = False
) -> str:
    """Return the heading, the section's docstring and the table of its keys; if `changeable`, all may change."""
    text = section.__dict__.get("__doc__") if section else None
    about = f"{inspect.cleandoc(text)}\n\n" if text else ""
    rows = [
        f"| `{prefix}{name}` | {_type(field.annotation)}{_bounds(field)} | {_default(field)} | "
        f"{'yes' if changeable or may_change_on_resume(field) else 'no'} | {_escaped(field.description or '')} |\n"
        for name, field in fields.items()
    ]
    return f"## {title}\n\n{about}| key | value | default | resume | meaning |\n|---|---|---|---|---|\n{''.join(rows)}"


def _type(annotation: Any) -> str:
    """Return a type in words: `whole number or null`."""
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if get_origin(annotation) is list:
        inner = section_of(annotation)
        return "list of stages" if inner else f"list of {_type(arguments[0]).replace('number', 'numbers')}"
    if get_origin(annotation) is tuple:
        return f"{len(arguments)} numbers"
    return " or ".join(map(_type, arguments)) if arguments else names[annotation]


def _bounds(field: FieldInfo) -> str:
    found = [
        text.format("2^63" if value == 2**63 else f"{value:,}")
        for item in field.metadata
        for name, text in BOUNDS.items()
        if (value := getattr(item, name, None)) is not None
    ]
    patterns = [f"`{item.pattern}`" for item in field.metadata if getattr(item, "pattern", None)]
    return "".join(f", {text}" for text in [*found, *patterns])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{field.default if isinstance(field.default, str) else json.dumps(field.default)}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(reference(), end="")
