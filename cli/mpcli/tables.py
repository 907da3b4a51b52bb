"""Reports on the terminal: tables for people, JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from mpcache.untrusted_names import printable


def print_json(content: Any) -> None:
    """Print plain values as JSON."""
    typer.echo(json.dumps(content, indent=1))


def print_table(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    *,
    left: Sequence[str] = (),
    head: bool = True,
) -> None:
    """Print columns of rows under their names; the columns in `left` are left-aligned."""
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    cells = [list(columns)] * head + cells
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    alignments = ["<" if column in left else ">" for column in columns]
    for line in cells:
        texts = (
            f"{text:{align}{width}}"
            for text, align, width in zip(line, alignments, widths, strict=True)
        )
        typer.echo("  ".join(texts).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if value is None:
        return "-"
    text = ",".join(map(str, value)) or "-" if isinstance(value, list | tuple) else str(value)
    return printable(text)  # names in a store may come from anybody
