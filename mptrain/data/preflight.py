"""The store that a run trains on: waited for, whole, and with rows for it, or refused in words."""

import time
import warnings
from collections.abc import Collection, Sequence

from tqdm import tqdm

from mpcache.errors import UsageError
from mptrain.config.run import RunConfig
from mptrain.config.sides import Side
from mptrain.data.loader import Split, Store, open_store, row_bytes
from mptrain.data.part_ranges import format_ranges

_SPLITS: tuple[Split, ...] = ("train", "validation")
_LOOK_EVERY = 1.0  # seconds


def open_trainable_store(
    config: RunConfig,
    sides: Sequence[Side],
    only_parts: Collection[int] | None = None,
    *,
    quiet: bool = True,
) -> Store:
    """Open the store of a run; `only_parts` are those that it reads, all if None.

    Raises:
        ValueError: with a remedy, where the store or the filters leave no rows to train on.
    """
    cache = config.cache_dir, config.cache_bytes
    if only_parts is not None:
        store = open_store(config.store, *cache).limited_to(only_parts)
    elif config.follow:
        store = await_parts(config.store, sides, *cache, quiet=quiet)
    else:
        store = open_store(config.store, *cache)
    _refuse_skipping_all(config, store)
    _refuse_uneven(store, sides)
    _refuse_nonfinite(config, store, sides)
    _refuse_small(config, store, sides)
    _refuse_large_windows(config, store, sides)
    return store


def await_parts(
    path: str,
    sides: Sequence[Side],
    cache_dir: str | None = None,
    cache_bytes: int | None = None,
    *,
    quiet: bool = True,
) -> Store:
    """The store once its collection has committed all that it plans of these sides."""
    told = f"waiting for {', '.join(map(':'.join, sides))} in {path}"
    is_told = False
    with tqdm(desc=told, unit="part", disable=quiet) as bar:
        while True:
            store = open_store(path, cache_dir, cache_bytes)
            planned, done = store.planned_parts, _common_parts(store, sides)
            bar.total, bar.n = len(planned), len(done & set(planned))
            bar.refresh()
            if store.is_planned and done >= set(planned):
                return store
            if not is_told and (warning := _doubt(store, sides)):
                warnings.warn(warning, RuntimeWarning, stacklevel=2)
                is_told = True
            time.sleep(_LOOK_EVERY)


def _doubt(store: Store, sides: Sequence[Side]) -> str | None:
    """What may be wrong where all that was collected is whole, and a side was never begun."""
    there = [(name, side) for name in store.hookpoints for side in store.sides(name)]
    absent = [side for side in sides if side not in there]
    is_whole = all(common_parts(store, [side]) >= set(store.planned_parts) for side in there)
    if not (store.is_planned and there and absent and is_whole):
        return None
    return (
        f"{store.storage} is whole, with {', '.join(map(':'.join, there))}, and has nothing of "
        f"{', '.join(map(':'.join, absent))}; the fit waits until that is collected"
    )


def _common_parts(store: Store, sides: Sequence[Side]) -> set[int]:
    """Parts that all sides have; none where a side has yet to be begun."""
    if not all(hookpoint in store.hookpoints for hookpoint, _ in sides):
        return set()
    return common_parts(store, sides)


def common_parts(store: Store, sides: Sequence[Side]) -> set[int]:
    """Parts of both splits that all of these sides have."""
    return {part.number for split in _SPLITS for part in store.parts(sides, split)}


def _refuse_skipping_all(config: RunConfig, store: Store) -> None:
    if config.skip_positions >= store.ctx_len:
        raise UsageError(
            "skip_positions must be less than ctx_len, got "
            f"skip_positions={config.skip_positions}, ctx_len={store.ctx_len}; use fewer"
        )


def _refuse_uneven(store: Store, sides: Sequence[Side]) -> None:
    """Common parts alone would make a coder's rows depend on its companions."""
    found = {side: common_parts(store, [side]) for side in sides}
    everything = set[int]().union(*found.values())
    if any(parts != everything for parts in found.values()):
        told = "; ".join(
            f"{':'.join(side)} has parts {format_ranges(parts) or 'none'}"
            for side, parts in found.items()
        )
        raise UsageError(
            f"the sides in {store.storage} have different parts ({told}); "
            "collect the missing parts, wait for a collection that is under way with --follow, "
            "or fit the sides in separate runs"
        )


def _refuse_nonfinite(config: RunConfig, store: Store, sides: Sequence[Side]) -> None:
    bad = {":".join(side): count for side in sides if (count := store.acts.nonfinite(*side))}
    if bad and not config.allow_nonfinite:
        told = ", ".join(f"{count} in {side}" for side, count in bad.items())
        raise UsageError(
            f"{config.store} holds non-finite values ({told}); "
            "collect with another --model-dtype or --dtype, or leave such rows out with "
            "--allow-nonfinite"
        )


def refuse_constant(store: Store, sides: Sequence[Side]) -> None:
    """ValueError for a side whose train rows are equal: losses are shares of its variance."""
    for side in sides:
        if not float(store.acts.moments(*side, "train")[1].sum()) > 0:
            raise UsageError(
                f"{':'.join(side)} has no variance in {store.storage}: its train rows are equal, "
                f"or none is finite; leave {side[0]} out, or collect other rows"
            )


def _refuse_small(config: RunConfig, store: Store, sides: Sequence[Side]) -> None:
    rows = sum(part.rows for part in store.parts(sides, "train"))
    if rows < config.batch_rows:
        fewer = f", or use --batch-rows {rows} or less" if rows else ""
        raise UsageError(
            f"{config.store} has {rows} train rows, too few for one batch of {config.batch_rows}; "
            f"collect more rows, wait for a collection that is under way with --follow{fewer}"
        )


def _refuse_large_windows(config: RunConfig, store: Store, sides: Sequence[Side]) -> None:
    per_row = 2 * row_bytes(store, sides)
    needed = per_row * max(config.window_rows, store.chunk_rows)  # a window is a chunk at least
    if needed > config.window_bytes:
        raise UsageError(
            f"two windows of {config.window_rows} rows on {len(sides)} sides take {needed} bytes, "
            f"more than window_bytes={config.window_bytes}; use --window-rows "
            f"{max(1, config.window_bytes // per_row)} or less, in all runs that are to be "
            f"compared, or --window-bytes {needed} or more"
        )
