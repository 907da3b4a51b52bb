"""What a run will do, before it does it: its coders, passes and train steps, memory and reading."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mptrain.config.coder import CoderConfig, all_sides
from mptrain.config.run import RunConfig
from mptrain.config.sides import Side
from mptrain.data.loader import Split, Store, row_bytes
from mptrain.runs.memory import CoderMemory, coder_memory, group_into_passes, pass_bytes
from mptrain.training.distributed import SINGLE_PROCESS, ProcessGroup
from mptrain.training.setup import train_steps

_POSITION = 8  # bytes of a row's position, of its place in a window, and of its turn
_KEPT_POSITION, _KEPT_FACT = 2, 4  # of all rows that are read: the position; the token, a norm
_WINDOWS = 2
_BATCHES = 3


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run that has not begun."""

    needs: tuple[CoderMemory, ...]
    "of each coder"
    passes: list[list[str]]
    "names of the coders that are trained together, in one reading of the rows"
    train_steps: int
    "of each pass"
    train_rows: int
    "rows of the train split"
    epochs: float
    "how often a pass reads the train split"
    device: str
    memory_bytes: Mapping[str, int]
    "by item, of the pass that takes most; a train step's is an estimate"
    read_bytes: int
    "of the store, as stored: rows to train on, and to validate on"
    store_bytes: int
    "bytes of these that come from the store itself; the rest comes from the read cache"


def make_plan(
    config: RunConfig,
    store: Store,
    device: torch.device,
    ranks: ProcessGroup = SINGLE_PROCESS,
    passes: list[list[str]] | None = None,
) -> RunPlan:
    """Plan a run. Reads the store's marks and no rows.

    `passes` are those of a run that is continued.

    Raises:
        ValueError: a coder cannot be made for the store's widths, or does not fit into max_memory.
    """
    coders = {one.name: one for one in config.coders()}
    needs = {name: _needs(one, config, store, device) for name, one in coders.items()}
    passes = passes or group_into_passes(list(needs.values()), config.max_memory, ranks)
    grouped = [[coders[name] for name in names] for names in passes]
    largest = max(passes, key=lambda names: pass_bytes([needs[name] for name in names]))
    sides = all_sides(coders.values())
    rows = sum(part.rows for part in store.parts(sides, "train"))
    read_bytes = sum(_read_bytes(together, config, store) for together in grouped)
    return RunPlan(
        needs=tuple(needs.values()),
        passes=passes,
        train_steps=train_steps(config),
        train_rows=rows,
        epochs=train_steps(config) * config.batch_rows / rows,
        device=str(device),
        memory_bytes=_memory(
            [needs[name] for name in largest], [coders[name] for name in largest], config, store
        ),
        read_bytes=read_bytes,
        store_bytes=_store_bytes(read_bytes, sides, config, store),
    )


def _needs(one: CoderConfig, config: RunConfig, store: Store, device: torch.device) -> CoderMemory:
    source, target = one.sides
    widths = store.width(*source), store.width(*target)
    return coder_memory(one, *widths, config.batch_rows, device)


def _memory(
    needs: Sequence[CoderMemory], coders: Sequence[CoderConfig], config: RunConfig, store: Store
) -> dict[str, int]:
    sides = all_sides(coders)
    values = sum(store.width(*side) for side in sides)
    a_row = 3 * _POSITION + row_bytes(store, sides)
    a_fact = _KEPT_POSITION + _KEPT_FACT * bool(config.skip_tokens)
    a_fact += _KEPT_POSITION * (config.only_tokens != "all")
    a_fact += _KEPT_FACT * len(sides) * (config.max_norm is not None)
    return {
        "weights": sum(one.weights_bytes for one in needs),
        "optimizer": sum(one.optimizer_bytes for one in needs),
        "train step": max(one.step_bytes for one in needs),
        "batches": _BATCHES * config.batch_rows * (_POSITION + 4 * values),
        "windows of rows (host)": _WINDOWS * max(config.window_rows, store.chunk_rows) * a_row,
        "facts of rows (host)": a_fact * sum(p.rows for p in store.parts(sides, "train")),
    }


def _read_bytes(coders: Sequence[CoderConfig], config: RunConfig, store: Store) -> int:
    """Of a pass: its train steps, each validation on the way, and the last one of all rows."""
    sides = all_sides(coders)
    steps = train_steps(config)
    train, validation = _stored(store, sides, "train"), _stored(store, sides, "validation")
    validated = min(config.eval_rows, validation.rows) * -(-steps // config.eval_every)
    read = train.a_row * steps * config.batch_rows
    return round(read + validation.a_row * (validated + validation.rows))


def _store_bytes(read_bytes: int, sides: Sequence[Side], config: RunConfig, store: Store) -> int:
    """Of what is read: with a read cache each byte once, without those it already has."""
    if config.cache_dir is None:
        return read_bytes
    splits: tuple[Split, ...] = ("train", "validation")
    there = sum(store.stored_bytes(sides, split) for split in splits)
    kept = sum(store.cached_bytes(sides, split) for split in splits)
    return round(min(read_bytes, there) * (1 - kept / max(1, there)))


@dataclass(frozen=True)
class _Stored:
    rows: int
    size: int

    @property
    def a_row(self) -> float:
        return self.size / max(1, self.rows)


def _stored(store: Store, sides: Sequence[Side], split: Split) -> _Stored:
    rows = sum(part.rows for part in store.parts(sides, split))
    return _Stored(rows, store.stored_bytes(sides, split))
