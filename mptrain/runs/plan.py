"""The plan of a run before it starts: coders, passes, train steps, memory and bytes to read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mptrain.config.coder import CoderConfig, all_sides
from mptrain.config.run import RunConfig
from mptrain.config.sides import Side
from mptrain.data.loader import Split, Store, row_bytes
from mptrain.runs.convergence import validation_steps
from mptrain.runs.memory import CoderMemory, coder_memory, group_into_passes, pass_bytes
from mptrain.training.distributed import SINGLE_PROCESS, ProcessGroup
from mptrain.training.setup import train_steps

_POSITION = 8  # bytes of a row's position, of its index in a window, and of its turn
_KEPT_POSITION, _KEPT_FIELD = 2, 4  # bytes kept of each row of the split: position; token, norm
_WINDOWS = 2
_BATCHES = 3


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will do."""

    coders: tuple[CoderMemory, ...]
    "memory of each coder"
    passes: list[list[str]]
    "names of the coders of each pass; a pass reads the train rows once"
    train_steps: int
    "train steps of each pass"
    train_rows: int
    "rows of the train split"
    epochs: float
    "how many times a pass reads the train split"
    device: str
    memory_bytes: Mapping[str, int]
    "bytes by purpose, of the pass that needs most; those of a train step are an estimate"
    read_bytes: int
    "stored bytes that are read, to train and to validate"
    store_bytes: int
    "bytes of these that come from the store itself; the rest comes from the read cache"


def make_plan(
    config: RunConfig,
    store: Store,
    device: torch.device,
    processes: ProcessGroup = SINGLE_PROCESS,
    passes: list[list[str]] | None = None,
) -> RunPlan:
    """Plan a run. Reads the store's marks and no rows.

    `passes` are those of a run that is continued.

    Raises:
        UsageError: a coder cannot be made for the store's widths, or does not fit into max_memory.
    """
    coders = {coder.name: coder for coder in config.coders()}
    memory = {name: _memory_of(coder, config, store, device) for name, coder in coders.items()}
    passes = passes or group_into_passes(list(memory.values()), config.max_memory, processes)
    largest = max(passes, key=lambda names: pass_bytes([memory[name] for name in names]))
    sides = all_sides(coders.values())
    train_rows = sum(part.rows for part in store.parts(sides, "train"))
    read_bytes = sum(
        _pass_read_bytes([coders[name] for name in names], config, store) for names in passes
    )
    return RunPlan(
        coders=tuple(memory.values()),
        passes=passes,
        train_steps=train_steps(config),
        train_rows=train_rows,
        epochs=train_steps(config) * config.batch_rows / train_rows,
        device=str(device),
        memory_bytes={
            **_coder_bytes([memory[name] for name in largest]),
            **_loader_bytes([coders[name] for name in largest], config, store),
        },
        read_bytes=read_bytes,
        store_bytes=_store_bytes(read_bytes, sides, config, store),
    )


def _memory_of(
    coder: CoderConfig, config: RunConfig, store: Store, device: torch.device
) -> CoderMemory:
    input_side, target_side = coder.sides
    widths = store.width(*input_side), store.width(*target_side)
    return coder_memory(coder, *widths, config.batch_rows, device)


def _coder_bytes(coders: Sequence[CoderMemory]) -> dict[str, int]:
    return {
        "weights": sum(coder.weights_bytes for coder in coders),
        "optimizer": sum(coder.optimizer_bytes for coder in coders),
        "train step": max(coder.step_bytes for coder in coders),
    }


def _loader_bytes(coders: Sequence[CoderConfig], config: RunConfig, store: Store) -> dict[str, int]:
    sides = all_sides(coders)
    values = sum(store.width(*side) for side in sides)
    window_rows = max(config.window_rows, store.chunk_rows)
    bytes_per_row = 3 * _POSITION + row_bytes(store, sides)
    field_bytes = _KEPT_POSITION + _KEPT_FIELD * bool(config.skip_tokens)
    field_bytes += _KEPT_POSITION * (config.only_tokens != "all")
    field_bytes += _KEPT_FIELD * len(sides) * (config.max_norm is not None)
    train_rows = sum(part.rows for part in store.parts(sides, "train"))
    return {
        "batches": _BATCHES * config.batch_rows * (_POSITION + 4 * values),
        "windows of rows (host)": _WINDOWS * window_rows * bytes_per_row,
        "positions, tokens and norms (host)": field_bytes * train_rows,
    }


def _pass_read_bytes(coders: Sequence[CoderConfig], config: RunConfig, store: Store) -> int:
    """Bytes that a pass reads: for train steps, evaluations, and the final one of all rows."""
    sides = all_sides(coders)
    steps = train_steps(config)
    train, validation = _stored(store, sides, "train"), _stored(store, sides, "validation")
    validations = len(validation_steps(steps, config.eval_every))
    evaluated_rows = min(config.eval_rows, validation.rows) * validations
    train_bytes = train.bytes_per_row * steps * config.batch_rows
    return round(train_bytes + validation.bytes_per_row * (evaluated_rows + validation.rows))


def _store_bytes(read_bytes: int, sides: Sequence[Side], config: RunConfig, store: Store) -> int:
    """Bytes read from the store itself. A read cache fetches each byte at most once."""
    if config.cache_dir is None:
        return read_bytes
    splits: tuple[Split, ...] = ("train", "validation")
    stored = sum(store.stored_bytes(sides, split) for split in splits)
    cached = sum(store.cached_bytes(sides, split) for split in splits)
    return round(min(read_bytes, stored) * (1 - cached / max(1, stored)))


@dataclass(frozen=True)
class _Stored:
    rows: int
    size: int
    "in bytes"

    @property
    def bytes_per_row(self) -> float:
        return self.size / max(1, self.rows)


def _stored(store: Store, sides: Sequence[Side], split: Split) -> _Stored:
    rows = sum(part.rows for part in store.parts(sides, split))
    return _Stored(rows, store.stored_bytes(sides, split))
