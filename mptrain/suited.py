"""Whether a store is one that a run can train on."""

from collections.abc import Sequence
from typing import Literal

from mptrain.config import RunConfig
from mptrain.loader import Side, Store

_SPLITS: tuple[Literal["train", "validation"], ...] = ("train", "validation")


def refuse_unsuited(config: RunConfig, store: Store, sides: Sequence[Side]) -> None:
    """Raise ValueError, with a remedy, where the store or the filters leave no rows to train on."""
    _refuse_skipping_all(config, store)
    _refuse_uneven(store, sides)
    _refuse_nonfinite(config, store, sides)


def _refuse_skipping_all(config: RunConfig, store: Store) -> None:
    if config.skip_positions >= store.ctx_len:
        raise ValueError(
            "skip_positions must be less than ctx_len, got "
            f"skip_positions={config.skip_positions}, ctx_len={store.ctx_len}; use fewer"
        )


def _refuse_uneven(store: Store, sides: Sequence[Side]) -> None:
    """Common parts alone would make a coder's rows depend on its companions."""
    found = {
        side: {p.number for split in _SPLITS for p in store.parts([side], split)} for side in sides
    }
    everything = set[int]().union(*found.values())
    if any(parts != everything for parts in found.values()):
        told = "; ".join(
            f"{':'.join(side)} has parts {_ranges(parts)}" for side, parts in found.items()
        )
        raise ValueError(
            f"the sides in {store.place} have different parts ({told}); "
            "collect the missing parts, or fit the sides in separate runs"
        )


def _ranges(numbers: set[int]) -> str:
    """Ascending numbers as runs: 0-6, 8."""
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    ends = sorted(n for n in numbers if n + 1 not in numbers)
    pairs = zip(starts, ends, strict=True)
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in pairs) or "none"


def _refuse_nonfinite(config: RunConfig, store: Store, sides: Sequence[Side]) -> None:
    bad = {":".join(side): count for side in sides if (count := store.nonfinite(*side))}
    if bad and not config.allow_nonfinite:
        told = ", ".join(f"{count} in {side}" for side, count in bad.items())
        raise ValueError(
            f"{config.store} holds non-finite values ({told}); "
            "collect with another --model-dtype or --dtype, or leave such rows out with "
            "--allow-nonfinite"
        )
