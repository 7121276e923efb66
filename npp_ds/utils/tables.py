"""The one look of tables on the terminal, for the report, the plan and the doctor. Imports rich when it is used."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def make_table(
    columns: Sequence[str],
    rows: Iterable[Sequence["RenderableType"]],
    *,
    title: str | None = None,
    totals: Sequence["RenderableType"] | None = None,
    justify: Literal["left", "right"] = "right",
) -> "Table":
    """Return a table for `rich.console.Console.print`; `totals` is a last row, set apart by a line."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*row)
    if totals is not None:
        table.add_section()
        table.add_row(*totals, style="bold")
    return table
