"""Make the golden store of the current format version: `python tests/golden.py`.

Run once when a version is born, never to make a failing test pass: the point of the golden store is
that it was written by the code of its time.
"""

import json
import shutil
import tempfile
from pathlib import Path

from mpcache.collect import collect
from mpcache.format import PLAIN_VERSION
from mpcache.reader import Store, open_store
from stores import small_config

FOLDER = Path(__file__).parent / "golden"
ARRAYS = ("tokens", "rows/position", "acts/layers.0/output")


def sums(store: Store) -> dict[str, int]:
    """Sums of the stored unsigned integers of each part, exact and independent of floats."""
    return {
        f"{part} {name}": int(values.astype("uint64").sum())
        for array in ARRAYS
        for part in store.numbers(array)
        for name, values in store.read_part(array, part).items()
        if values.dtype.kind == "u"
    }


def main() -> None:
    place = FOLDER / f"store-v{PLAIN_VERSION}"
    shutil.rmtree(place, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        config = small_config(
            Path(folder), hookpoints=("layers.0",), rows=120, part_rows=64, codec="zstd"
        )
        collect(config, place)
    place.with_suffix(".json").write_text(json.dumps(sums(open_store(place)), indent=1) + "\n")


if __name__ == "__main__":
    main()
