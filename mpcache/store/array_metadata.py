"""The `zarr.json` files of a store: made for a number of parts, checked, and only ever extended."""

import json

from mpcache.errors import DamagedStoreError
from mpcache.storage.base import Storage
from mpcache.store.array_spec import ArraySpec
from mpcache.store.object_paths import array_specs
from mpcache.store.part_layout import Layout


def check_metadata(storage: Storage, spec: ArraySpec) -> int:
    """Compare an array's `zarr.json` with what the layout implies; return the parts it spans."""
    file = f"{storage}/{spec.metadata_path}"
    try:
        data = storage.read(spec.metadata_path)
        metadata = json.loads(data)
        parts, rest = divmod(metadata["shape"][0], spec.part_shape[0])
        implied = json.loads(spec.metadata(parts)[spec.metadata_path])
    except (
        FileNotFoundError, ValueError, KeyError, TypeError, IndexError, RecursionError
    ) as error:  # fmt: skip
        raise DamagedStoreError(f"{file} is damaged or missing: {error}") from error
    # spelled again as Zarr spells it: a changed blank would otherwise go unseen
    spellings = {json.dumps(metadata, indent=indent).encode() for indent in (None, 2)}
    if rest or metadata != implied or data not in spellings:
        raise DamagedStoreError(
            f"{file} is damaged: its content differs from what mpcache writes for this array"
        )
    return int(parts)


def grow_array(storage: Storage, layout: Layout, array: str, parts: int, width: int = 0) -> None:
    """Let the metadata of an array span `parts` parts; longer metadata stays.

    `width` is that of an `acts` array.
    """
    for spec in array_specs(array, layout, width):
        files = spec.metadata(parts)
        is_new = [storage.create(name, data) for name, data in files.items()]
        if not is_new[-1] and check_metadata(storage, spec) < parts:
            storage.replace(spec.metadata_path, files[spec.metadata_path])
        if any(is_new):
            storage.sync(spec.metadata_path)  # new folders of groups and arrays with it


def ensure_spans(storage: Storage, layout: Layout, array: str, part: int, width: int) -> None:
    """Let the metadata span a part, should another process have shortened it since."""
    for spec in array_specs(array, layout, width):
        is_there = storage.size(spec.metadata_path) is not None
        if not is_there or check_metadata(storage, spec) <= part:
            grow_array(storage, layout, array, part + 1, width)
