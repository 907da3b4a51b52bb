"""Checks of a store before a run trains on it; waiting for a collection that is under way."""

import os
import time
import warnings
from collections.abc import Collection, Sequence

from tqdm import tqdm

from mpcache.errors import UsageError
from mptrain.config.run import RunConfig
from mptrain.config.sides import Side
from mptrain.data.loader import Split, Store, open_store, row_bytes
from mptrain.data.ranges_as_text import format_ranges

_SPLITS: tuple[Split, ...] = ("train", "validation")
_POLL_SECONDS = 1.0


def open_trainable_store(
    config: RunConfig,
    sides: Sequence[Side],
    only_parts: Collection[int] | None = None,
    *,
    quiet: bool = True,
) -> Store:
    """Open the store of a run, limited to the given parts; None: all of them.

    Raises:
        UsageError: a run cannot train on the store, for example because it has too few rows.
    """
    cache = config.cache_dir, config.cache_bytes
    if only_parts is not None:
        store = open_store(config.store, *cache).limited_to(only_parts)
    elif config.follow:
        store = await_parts(config.store, sides, *cache, quiet=quiet)
    else:
        store = open_store(config.store, *cache)
    _check_skip_positions(config, store)
    _check_equal_parts(store, sides)
    _check_finite(config, store, sides)
    _check_enough_rows(config, store, sides)
    check_window_memory(store, sides, config.window_rows, _machine_memory())
    return store


def await_parts(
    path: str,
    sides: Sequence[Side],
    cache_dir: str | None = None,
    cache_bytes: int | None = None,
    *,
    quiet: bool = True,
) -> Store:
    """Wait until a collection has committed all planned parts of these sides; return the store."""
    title = f"waiting for {', '.join(map(':'.join, sides))} in {path}"
    has_warned = False
    with tqdm(desc=title, unit="part", disable=quiet) as bar:
        while True:
            store = open_store(path, cache_dir, cache_bytes)
            planned, done = store.planned_parts, _committed_parts(store, sides)
            bar.total, bar.n = len(planned), len(done & set(planned))
            bar.refresh()
            if store.is_planned and done >= set(planned):
                return store
            if not has_warned and (warning := _endless_wait_warning(store, sides)):
                warnings.warn(warning, RuntimeWarning, stacklevel=2)
                has_warned = True
            time.sleep(_POLL_SECONDS)


def _endless_wait_warning(store: Store, sides: Sequence[Side]) -> str | None:
    """Return a warning where the collection is complete and some of the sides are not in it."""
    collected = [(name, side) for name in store.hookpoints for side in store.sides(name)]
    absent = [side for side in sides if side not in collected]
    is_complete = all(common_parts(store, [side]) >= set(store.planned_parts) for side in collected)
    if not (store.is_planned and collected and absent and is_complete):
        return None
    return (
        f"{store.storage} is complete, but holds only {', '.join(map(':'.join, collected))}; the "
        "run "
        f"waits for {', '.join(map(':'.join, absent))}: start mpcache collect with these "
        "hookpoints, "
        "or stop the run"
    )


def _committed_parts(store: Store, sides: Sequence[Side]) -> set[int]:
    """Numbers of the parts that all sides have; none where a side is not in the store yet."""
    if not all(hookpoint in store.hookpoints for hookpoint, _ in sides):
        return set()
    return common_parts(store, sides)


def common_parts(store: Store, sides: Sequence[Side]) -> set[int]:
    """Return the numbers of the parts, of both splits, that all of these sides have."""
    return {part.number for split in _SPLITS for part in store.parts(sides, split)}


def _check_skip_positions(config: RunConfig, store: Store) -> None:
    if config.skip_positions >= store.ctx_len:
        raise UsageError(
            "skip_positions must be less than ctx_len, got "
            f"skip_positions={config.skip_positions}, ctx_len={store.ctx_len}; use a smaller "
            "--skip-positions"
        )


def _check_equal_parts(store: Store, sides: Sequence[Side]) -> None:
    """All sides must have the same parts, else a coder's rows would depend on the other coders."""
    by_side = {side: common_parts(store, [side]) for side in sides}
    all_parts = set[int]().union(*by_side.values())
    if any(parts != all_parts for parts in by_side.values()):
        details = "; ".join(
            f"{':'.join(side)} has parts {format_ranges(parts) or 'none'}"
            for side, parts in by_side.items()
        )
        raise UsageError(
            f"the hookpoints in {store.storage} have different parts ({details}); "
            "collect the missing parts, wait for a running collection with --follow, "
            "or train on these hookpoints in separate runs"
        )


def _check_finite(config: RunConfig, store: Store, sides: Sequence[Side]) -> None:
    bad = {":".join(side): count for side in sides if (count := store.acts.nonfinite(*side))}
    if bad and not config.allow_nonfinite:
        details = ", ".join(f"{count} in {side}" for side, count in bad.items())
        raise UsageError(
            f"{config.store} holds NaN or infinite values ({details}); "
            "collect with another --model-dtype or --dtype, or exclude the rows with such values: "
            "--allow-nonfinite"
        )


def check_variance(store: Store, sides: Sequence[Side]) -> None:
    """Check that the train rows of each side differ: losses are divided by their variance.

    Raises:
        UsageError: all train rows of a side are equal, or none is finite.
    """
    for side in sides:
        if not float(store.acts.moments(*side, "train")[1].sum()) > 0:
            raise UsageError(
                f"{':'.join(side)} has no variance in {store.storage}: its train rows are equal, "
                f"or none is finite; remove {side[0]} from --hookpoints, or collect other rows"
            )


def _check_enough_rows(config: RunConfig, store: Store, sides: Sequence[Side]) -> None:
    rows = sum(part.rows for part in store.parts(sides, "train"))
    if rows < config.batch_rows:
        fewer = f", or use --batch-rows {rows} or less" if rows else ""
        raise UsageError(
            f"{config.store} has {rows} train rows, too few for one batch of {config.batch_rows}; "
            f"collect more rows, wait for a running collection with --follow{fewer}"
        )


def check_window_memory(
    store: Store, sides: Sequence[Side], window_rows: int, memory_bytes: int
) -> None:
    """Check that the two shuffle windows fit into the memory of the machine.

    Raises:
        UsageError: they do not fit; the message names the largest `window_rows` that does.
    """
    per_row = 2 * row_bytes(store, sides)
    needed = per_row * max(window_rows, store.chunk_rows)  # a window is a chunk at least
    if needed > memory_bytes:
        raise UsageError(
            f"--window-rows {window_rows} needs {needed / 1e9:.3g} GB of memory (two windows of "
            f"{len(sides)} arrays), but this machine has {memory_bytes / 1e9:.3g} GB; use "
            f"--window-rows {max(1, memory_bytes // per_row)} or less, the same in all runs that "
            "you compare"
        )


def _machine_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
