"""Reports on the terminal: tables for people, JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from mpcache.guard import printable


def print_json(content: Any) -> None:
    """Print plain values as JSON."""
    typer.echo(json.dumps(content, indent=1))


def print_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the named columns of rows, right-aligned under their names."""
    cells = [list(columns), *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        typer.echo("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if value is None:
        return "-"
    text = ",".join(map(str, value)) or "-" if isinstance(value, list | tuple) else str(value)
    return printable(text)  # names in a store are others' words
