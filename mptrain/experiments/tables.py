"""The tables behind a figure, as CSV and as JSON."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def write_table(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Write the same rows as `stem` with the endings csv and json; gives their paths."""
    csv_path, json_path = (stem.with_name(f"{stem.name}.{ending}") for ending in ("csv", "json"))
    with csv_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys() if rows else ())
        writer.writeheader()
        writer.writerows(rows)
    json_path.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    return [csv_path, json_path]
