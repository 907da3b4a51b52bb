"""Rewrite a store in another dtype, codec, chunking or part size, or with some of its hookpoints.

Rows keep their order in each split, so that the new store has the fingerprint of its source; its
provenance names the source. Parts are independent: the same call goes on where it stopped.
Memory, for each part in work at a time: the new part in both dtypes, and 32 MB; where part_rows
change, a part of the source too.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mpcache.config import ConvertConfig
from mpcache.errors import UsageError
from mpcache.maintenance.copy import Moved, arrived, copy_part, receive, refuse_nesting
from mpcache.maintenance.repartition import Repartition
from mpcache.model.hookpoint_patterns import Side, matches_pattern, named_sides, pattern_segments
from mpcache.parallel.config import ParallelConfig
from mpcache.parallel.ordered_map import ordered_map
from mpcache.storage.base import Storage, open_storage
from mpcache.store.description import read_store_file
from mpcache.store.format import POSITION, SEQUENCE, TOKENS, acts_array, mark_path
from mpcache.store.layout import Layout
from mpcache.store.reader import Store, open_store
from mpcache.store.sealed_json import digest, seal
from mpcache.store.writer import Writer
from mpcache.version import __version__


def convert(
    source: str | Path | Storage,
    target: str | Path | Storage,
    config: ConvertConfig,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008  frozen
    *,
    quiet: bool = True,
) -> Moved:
    """Make a store of the same rows, or complete the one that an earlier call began.

    Raises:
        ValueError: the user's mistake; nothing was written.
        DamagedStoreError: a part of the source is not what was committed.
    """
    store, to = open_store(source), open_storage(target)
    refuse_nesting(store.storage, to)
    layout = _layout(store, config)
    sides = select(config.hookpoints, store)
    arrays = [a for a in store.arrays if not a.startswith("acts/")]
    arrays += [acts_array(side.hookpoint, side.side) for side in sides]
    cut = Repartition(store, layout, arrays)
    data = seal(_content(store, layout, sides))
    receive(to, data, layout, [store.width(side.hookpoint, side.side) for side in sides])
    writer = Writer(to, layout, store.fingerprint)
    for array in arrays:
        cut.grow(array, writer)
    marks = [(part, array) for array in arrays for part in cut.parts(array)]
    found = ordered_map(functools.partial(_convert_part, cut, writer), marks, parallel, quiet=quiet)
    done = list(tqdm(found, "convert", len(marks), unit="mark", disable=quiet))
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
        segments = pattern_segments(hookpoint)
        names = [name for name in store.hookpoints if matches_pattern(segments, name.split("."))]
        found = {one for name in names for one in named_sides(name, side)} & set(there)
        if not found or (colon and side not in ("input", "output")):
            raise UsageError(
                f"hookpoints must be in the store, got {pattern!r}; "
                f"it has {', '.join(map(str, there)) or 'none'}"
            )
        chosen |= found
    return tuple(side for side in there if side in chosen)


def _layout(store: Store, config: ConvertConfig) -> Layout:
    names = ("dtype", "codec", "chunk_rows", "part_rows")
    asked = {name: getattr(config, name) for name in names}
    return dataclasses.replace(store.layout, **{k: v for k, v in asked.items() if v is not None})


def _content(store: Store, layout: Layout, sides: tuple[Side, ...]) -> dict[str, Any]:
    """What `store.json` of the new store says: the same for every call, so that one can go on."""
    content = read_store_file(store.storage)
    source = {
        "store": store.storage.name,
        "store_digest": digest(content),
        "dtype": store.layout.dtype,
        "codec": store.layout.codec,
        "chunk_rows": store.layout.chunk_rows,
        "part_rows": store.layout.part_rows,
        "mpcache_version": __version__,
        "converted_from": store.provenance.get("converted_from"),
    }
    changed = {"dtype": layout.dtype, "codec": layout.codec, "chunk_rows": layout.chunk_rows}
    return {
        **content,
        "layout": layout.as_json(),
        "config": {**store.config, **changed, "hookpoints": [str(side) for side in sides]},
        "provenance": {**store.provenance, "converted_from": source},
    }


def _convert_part(cut: Repartition, writer: Writer, mark: tuple[int, str]) -> tuple[int, int]:
    """Bytes written, and values that became infinite; nothing where the part is there already."""
    part, array = mark
    if writer.storage.size(mark_path(part, array)) is not None:
        cut.refuse_growth(part, array, writer)
        return 0, 0
    if cut.is_copy(array):
        return copy_part(cut.store, writer, mark), 0
    before = give_converted(cut, writer, part, array)
    new = writer.mark(part, array)
    size = new.stored_bytes
    return size, new.nonfinite - before


def give_converted(cut: Repartition, writer: Writer, part: int, array: str) -> int:
    """Have a part written in the new layout; gives its values that were not finite before."""
    if array == TOKENS:
        flags = cut.values(part, array, 1) if cut.layout.token_flags else None
        tokens = cut.values(part, array)
        writer.commit_tokens(part, tokens, flags, cut.progress(part), cut.rows(part))
    elif array in (SEQUENCE, POSITION):
        writer.commit_index(part, array, cut.values(part, array))
    else:
        x_RW = torch.from_numpy(cut.values(part, array))
        x_RW = x_RW.view(getattr(torch, cut.store.layout.dtype))
        writer.commit_acts(part, array, x_RW.to(getattr(torch, writer.layout.dtype)))
        if cut.has_nonfinite(part, array):  # rare, and a pass over all values
            return int((~x_RW.isfinite()).sum())
    return 0
