"""Rewrite a store in another dtype, codec or chunking, or with some of its hookpoints.

Rows keep their order, parts and splits, so that the new store has the fingerprint of its source;
its provenance names the source. Parts are independent: the same call goes on where it stopped.
Memory: one part of one array as stored, once more as float64 pieces, and once in the new dtype.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

import mpcache
from mpcache.config import ConvertConfig
from mpcache.format import (
    Layout,
    acts,
    digest,
    mark_path,
    read_store_file,
    seal,
    specs,
)
from mpcache.guard import DamagedStoreError
from mpcache.hooks import Side, check_segments, is_match, sides_of
from mpcache.move import Moved, arrived, bar, copy_part, grow_alike, receive, refuse_nesting
from mpcache.place import Place, place_of
from mpcache.reader import Store, open_store
from mpcache.writer import Writer, values_digest


def convert(
    source: str | Path | Place,
    target: str | Path | Place,
    config: ConvertConfig,
    *,
    quiet: bool = True,
) -> Moved:
    """Make a store of the same rows, or complete the one that an earlier call began.

    Raises:
        ValueError: the user's mistake; nothing was written.
        DamagedStoreError: a part of the source is not what was committed.
    """
    store, to = open_store(source), place_of(target)
    refuse_nesting(store.place, to)
    layout = _layout(store, config)
    arrays = [a for a in store.arrays if not a.startswith("acts/")]
    sides = select(config.hookpoints, store)
    arrays += [acts(side.hookpoint, side.side) for side in sides]
    data = seal(_content(store, layout, sides))
    receive(to, data)
    writer = Writer(to, layout)
    for array in arrays:
        grow_alike(store, array, writer)
    marks = [(part, array) for array in arrays for part in store.numbers(array)]
    with bar(marks, "convert", quiet) as each:
        done = [_convert_part(store, part, array, writer) for part, array in each]
    arrived(to, data)
    return Moved(
        store=str(to),
        parts=len(marks),
        written=sum(size > 0 for size, _ in done),
        bytes=sum(size for size, _ in done),
        nonfinite=sum(count for _, count in done),
    )


def select(patterns: tuple[str, ...], store: Store) -> tuple[Side, ...]:
    """The sides of a store that patterns name, as `collect` reads them; all without a pattern."""
    there = [Side(h, s) for h in store.hookpoints for s in store.sides(h)]  # type: ignore[arg-type]  # input or output
    if not patterns:
        return tuple(there)
    chosen: set[Side] = set()
    for pattern in patterns:
        hookpoint, colon, side = pattern.partition(":")
        segments = check_segments(hookpoint)
        names = [name for name in store.hookpoints if is_match(segments, name.split("."))]
        found = {one for name in names for one in sides_of(name, side)} & set(there)
        if not found or (colon and side not in ("input", "output")):
            raise ValueError(
                f"hookpoints must be in the store, got {pattern!r}; "
                f"it has {', '.join(map(str, there)) or 'none'}"
            )
        chosen |= found
    return tuple(side for side in there if side in chosen)


def _layout(store: Store, config: ConvertConfig) -> Layout:
    asked = {name: getattr(config, name) for name in ("dtype", "codec", "chunk_rows")}
    return dataclasses.replace(store.layout, **{k: v for k, v in asked.items() if v is not None})


def _content(store: Store, layout: Layout, sides: tuple[Side, ...]) -> dict[str, Any]:
    """What `store.json` of the new store says: the same for every call, so that one can go on."""
    content = read_store_file(store.place)
    source = {
        "store": store.place.name,
        "store_digest": digest(content),
        "dtype": store.layout.dtype,
        "codec": store.layout.codec,
        "chunk_rows": store.layout.chunk_rows,
        "mpcache_version": mpcache.__version__,
        "converted_from": store.provenance.get("converted_from"),
    }
    changed = {"dtype": layout.dtype, "codec": layout.codec, "chunk_rows": layout.chunk_rows}
    return {
        **content,
        "layout": dataclasses.asdict(layout),
        "config": {**store.config, **changed, "hookpoints": [str(side) for side in sides]},
        "provenance": {**store.provenance, "converted_from": source},
    }


def _convert_part(store: Store, part: int, array: str, writer: Writer) -> tuple[int, int]:
    """Bytes written, and values that became infinite; nothing where the part is there already."""
    if writer.place.size(mark_path(part, array)) is not None:
        return 0, 0
    mark = store.mark(part, array)
    width = int(mark.get("width", 0))
    if specs(array, store.layout, width) == specs(array, writer.layout, width):
        return copy_part(store, part, array, writer), 0
    values = store.read_part(array, part)
    for spec in specs(array, store.layout, width):
        told = mark["objects"][spec.object_path(part)]["values_xxh3_128"]
        if values_digest(values[spec.name]) != told:
            name = f"{store.place}/{spec.object_path(part)}"
            raise DamagedStoreError(f"{name} is damaged: it decodes to other values")
    if array.startswith("acts/"):
        x_RW = torch.from_numpy(values[array]).view(getattr(torch, store.layout.dtype))
        writer.commit_acts(part, array, x_RW.to(getattr(torch, writer.layout.dtype)))
    else:
        writer.commit_index(part, array, values[array])
    new = writer.mark(part, array)
    size = sum(one["bytes"] for one in new["objects"].values())
    return size, int(new.get("nonfinite", 0)) - int(mark.get("nonfinite", 0))
