"""Tables of results as CSV files that grow by rows; a file is replaced whole or not at all."""

import contextlib
import csv
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any


def read_rows(table: Path) -> list[dict[str, str]]:
    """Rows of the table, as text; none where there is no table yet."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def append_rows(table: Path, rows: Sequence[Any]) -> None:
    """Write the table with these rows added; rows are dataclasses of one class."""
    table.parent.mkdir(parents=True, exist_ok=True)
    partial = table.with_suffix(".partial")
    with _locked(table.parent):
        old = read_rows(table)
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
            writer.writeheader()
            writer.writerows([*old, *map(asdict, rows)])
        partial.replace(table)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time change the tables of a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
