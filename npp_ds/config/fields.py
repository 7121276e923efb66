"""What all sections of the schema share: how values are read, how sections nest, which keys may change on resume."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, to_jsonable_python


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject booleans for numeric keys; pydantic would read them as 0 or 1."""
        several = isinstance(value, list)
        is_true_or_false = any(isinstance(item, bool) for item in (value if several else [value]))
        if is_true_or_false and {int, float} & _types_in(cls.model_fields[info.field_name or ""].annotation):
            raise PydanticCustomError("number", "numbers" if several else "a number")
        return value


def _types_in(annotation: Any) -> set[Any]:
    """Return the types that an annotation is made of: int and NoneType of `list[int] | None`."""
    parts = get_args(annotation)
    return set().union(*map(_types_in, parts)) if parts else {annotation}


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section class in a field's annotation, such as StageSection in `list[StageSection] | None`."""
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):  # Python 3.10: list[x] is a type, too
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield each key, with its section's name in front, and its field: `("model.dim", ...)`, sections after their keys.

    The keys of a list of sections have N for the number of the entry: `schedule.stages.N.epochs`.
    """
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        if inner := section_of(field.annotation):
            yield from keys_of(inner, f"{prefix}{name}." if inner is field.annotation else f"{prefix}{name}.N.")


def may_change_on_resume(field: FieldInfo) -> bool:
    """Return whether a key may differ between the starts of a run."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("may_change_on_resume"))


def fixed_keys(section: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a section that must not change: a missing one with its default, an unknown one unchanged."""
    fields = section.model_fields
    fixed = {name: value for name, value in values.items() if name not in fields}
    for name, field in fields.items():
        if may_change_on_resume(field) or (name not in values and field.is_required()):
            continue
        value = values[name] if name in values else to_jsonable_python(field.default)
        inner = section_of(field.annotation)
        if inner and isinstance(value, dict):
            value = fixed_keys(inner, value)
        elif inner and isinstance(value, list):
            value = [fixed_keys(inner, item) for item in value]
        fixed[name] = value
    return fixed
