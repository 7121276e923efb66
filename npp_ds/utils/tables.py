"""The one look of tables on the terminal, for the report, the plan and the doctor. Imports rich when it is used."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from npp_ds.utils.format import printable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def make_table(
    columns: Sequence[str],
    rows: Iterable[Sequence["str | Text"]],
    *,
    title: str | None = None,
    totals: Sequence[str] | None = None,
    justify: Literal["left", "right"] = "right",
) -> "Table":
    """Return a table for `rich.console.Console.print`; `totals` is a last row, set apart by a line.

    Cells that are no `plain_text` yet are made so.
    """
    from rich.table import Table

    table = Table(title=plain_text(title) if title else None, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(plain_text(cell) if isinstance(cell, str) else cell for cell in row))
    if totals is not None:
        table.add_section()
        table.add_row(*map(plain_text, totals), style="bold")
    return table


def plain_text(text: str, style: str = "") -> "Text":
    """Return text for rich in one style: its brackets are no markup, and control characters in it are escaped."""
    from rich.text import Text

    return Text(printable(text, keep="\n"), style)
