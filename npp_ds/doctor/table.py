"""The doctor's findings as a table on a terminal, as plain lines elsewhere, or as JSON."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from npp_ds.doctor.outcome import FAILURE, OK, WARNING, Row

COLUMNS = ("check", "result", "detail")
_STYLES = {OK: "green", WARNING: "yellow", FAILURE: "bold red"}


def print_rows(rows: Sequence[Row]) -> None:
    if not sys.stdout.isatty():
        lines = [COLUMNS, *((row.name, row.state, row.detail) for row in rows)]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        for name, state, detail in lines:
            print(f"{name:<{widths[0]}}  {state:<{widths[1]}}  {detail}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(row.name, Text(row.state, _STYLES.get(row.state, "dim")), Text(row.detail))
    Console().print(table)


def print_json(rows: Sequence[Row], result: str, processes: int, nodes: int) -> None:
    print(json.dumps({"result": result, "processes": processes, "nodes": nodes, "checks": [asdict(r) for r in rows]}))
