"""Rewrite a store in another dtype, codec, chunking or part size, or with some of its hookpoints.

Rows keep their order in each split, so the new store has the fingerprint of its source. Its
provenance names the source. Parts are independent: the same call continues an interrupted one.
Memory for each part in work at the same time: the new part in both dtypes, and 32 MB; if part_rows
changes, a part of the source too.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mpcache.config import ConvertConfig
from mpcache.errors import UsageError
from mpcache.maintenance.copy import CopySummary, copy_part
from mpcache.maintenance.incoming_store import begin_store, check_not_nested, finish_store
from mpcache.maintenance.repartition import Repartition
from mpcache.model.hookpoint_patterns import Side, matches_pattern, named_sides, pattern_segments
from mpcache.parallel.config import ParallelConfig
from mpcache.parallel.ordered_map import ordered_map
from mpcache.storage.base import Storage, open_storage
from mpcache.store.object_paths import POSITION, SEQUENCE, TOKENS, acts_array, mark_path
from mpcache.store.part_layout import Layout
from mpcache.store.reader import Store, open_store
from mpcache.store.sealed_json import digest, seal
from mpcache.store.store_metadata import read_store_file
from mpcache.store.writer import Writer
from mpcache.version import __version__


def convert(
    source: str | Path | Storage,
    target: str | Path | Storage,
    config: ConvertConfig,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008  frozen
    *,
    quiet: bool = True,
) -> CopySummary:
    """Create a store of the same rows in another form, or continue an interrupted conversion.

    Args:
        source: Path or URL of the store.
        target: Path or URL of the new store.
        config: What changes: dtype, codec, chunks, parts, hookpoints.
        parallel: Threads and processes that convert parts. They do not change the new store.
        quiet: Without a progress bar.

    Raises:
        UsageError: `source` is no store, `target` holds something else, or the change is not
            possible. Nothing was written.
        DamagedStoreError: A part of the source is not what was committed.

    Example:
        ```python
        from mpcache import ConvertConfig, convert

        summary = convert("store", "store-float32", ConvertConfig(dtype="float32"))
        print(summary.nonfinite, "values became infinite")
        ```
    """
    store, to = open_store(source), open_storage(target)
    check_not_nested(store.storage, to)
    layout = _new_layout(store, config)
    sides = select_sides(config.hookpoints, store)
    arrays = [a for a in store.arrays if not a.startswith("acts/")]
    arrays += [acts_array(side.hookpoint, side.side) for side in sides]
    repartition = Repartition(store, layout, arrays)
    store_file = seal(_new_description(store, layout, sides))
    begin_store(to, store_file, layout, [store.width(s.hookpoint, s.side) for s in sides])
    writer = Writer(to, layout, store.fingerprint)
    for array in arrays:
        repartition.grow(array, writer)
    marks = [(part, array) for array in arrays for part in repartition.map.parts(array)]
    convert_part = functools.partial(_convert_part, repartition, writer)
    results = ordered_map(convert_part, marks, parallel, quiet=quiet)
    done = list(tqdm(results, "convert", len(marks), unit="mark", disable=quiet))
    finish_store(to, store_file)
    return CopySummary(
        store=str(to),
        parts=len(marks),
        written=sum(size > 0 for size, _ in done),
        bytes=sum(size for size, _ in done),
        nonfinite=sum(count for _, count in done),
    )


def select_sides(patterns: tuple[str, ...], store: Store) -> tuple[Side, ...]:
    """The sides of a store that patterns name, as `collect` reads patterns; all if there is none.

    Raises:
        UsageError: a pattern names nothing in the store.
    """
    all_sides = [Side(h, s) for h in store.hookpoints for s in store.sides(h)]  # type: ignore[arg-type]  # input or output
    if not patterns:
        return tuple(all_sides)
    chosen: set[Side] = set()
    for pattern in patterns:
        hookpoint, colon, side = pattern.partition(":")
        segments = pattern_segments(hookpoint)
        names = [name for name in store.hookpoints if matches_pattern(segments, name.split("."))]
        matches = {match for name in names for match in named_sides(name, side)} & set(all_sides)
        if not matches or (colon and side not in ("input", "output")):
            raise UsageError(
                f"hookpoints must be in the store, got {pattern!r}; use some of: "
                f"{', '.join(map(str, all_sides)) or 'none'}"
            )
        chosen |= matches
    return tuple(side for side in all_sides if side in chosen)


def _new_layout(store: Store, config: ConvertConfig) -> Layout:
    names = ("dtype", "codec", "chunk_rows", "part_rows")
    changes = {name: getattr(config, name) for name in names}
    return dataclasses.replace(store.layout, **{k: v for k, v in changes.items() if v is not None})


def _new_description(store: Store, layout: Layout, sides: tuple[Side, ...]) -> dict[str, Any]:
    """The content of the new `store.json`: the same in every call, so that a call can continue."""
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


def _convert_part(
    repartition: Repartition, writer: Writer, mark: tuple[int, str]
) -> tuple[int, int]:
    """Bytes written, and values that became infinite; 0 of both if the part is there already."""
    part, array = mark
    if writer.storage.size(mark_path(part, array)) is not None:
        repartition.check_not_grown(part, array, writer)
        return 0, 0
    if repartition.is_copy(array):
        return copy_part(repartition.store, writer, mark), 0
    before = write_converted(repartition, writer, part, array)
    new = writer.mark(part, array)
    return new.stored_bytes, new.nonfinite - before


def write_converted(repartition: Repartition, writer: Writer, part: int, array: str) -> int:
    """Write a part in the new layout. Returns its values that were not finite before."""
    if array == TOKENS:
        flags = repartition.values(part, array, 1) if repartition.layout.token_flags else None
        tokens, parts = repartition.values(part, array), repartition.map
        writer.commit_tokens(part, tokens, flags, parts.progress(part), parts.rows(part))
    elif array in (SEQUENCE, POSITION):
        writer.commit_index(part, array, repartition.values(part, array))
    else:
        x_RW = torch.from_numpy(repartition.values(part, array))
        x_RW = x_RW.view(getattr(torch, repartition.store.layout.dtype))
        writer.commit_acts(part, array, x_RW.to(getattr(torch, writer.layout.dtype)))
        if repartition.has_nonfinite(part, array):  # rare, and it takes a pass over all values
            return int((~x_RW.isfinite()).sum())
    return 0
