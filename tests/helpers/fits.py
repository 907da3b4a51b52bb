"""Small runs over `stores.small_store`, and what lasts of them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mptrain.config.fit import FitConfig
from mptrain.runs.fit import TrainLoop
from mptrain.runs.metrics import Record, read_records

BLANK = {"train_seconds": 0.0, "wait_seconds": 0.0, "validation_seconds": 0.0}
BLANK |= {"rows_per_second": 0.0, "peak_memory_bytes": 0}


def interrupt_at(patch: pytest.MonkeyPatch, stops_at: int) -> None:
    """Let Ctrl-C come in place of this train step, counted from 1 over all fits from now on."""
    train, calls = TrainLoop._train, 0

    def interrupted(self: TrainLoop, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stops_at:
            raise KeyboardInterrupt
        return train(self, batch)

    patch.setattr(TrainLoop, "_train", interrupted)


def config(store: str, run: Path, **changes: Any) -> FitConfig:
    settings: dict[str, Any] = {
        "store": store,
        "run": str(run),
        "hookpoints": ("layers.1.mlp",),
        "kind": ("sae", "skip-transcoder"),
        "k": (3,),
        "expansion": (2,),
        "rows": 64 * 24,
        "batch_rows": 64,
        "window_rows": 128,
        "log_every": 2,
        "eval_every": 8,
        "save_every": 5,
        "dead_rows": 200,
        "device": "cpu",
        **changes,
    }
    return FitConfig(**settings)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(run.glob("coders/*/coder.safetensors"))
        for name, tensor in load_file(file).items()
    }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def lasting(run: Path) -> list[Record]:
    """Records without what depends on the clock and the process."""
    records = [dataclasses.asdict(r) for r in read_records(run / "metrics.jsonl")]
    return [Record(**{**r, **BLANK}) for r in records]


def state(run: Path) -> dict[str, torch.Tensor]:
    """Tensors of the last state that was kept."""
    (folder,) = (f for f in (run / "state").iterdir() if f.name.isdecimal())
    return load_file(folder / "state.safetensors")
