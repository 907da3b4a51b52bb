"""Small runs over `stores.small_store`, and the results that a restart must not change."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mptrain.config.coder_grid import FitConfig
from mptrain.runs.metrics_file import Record, read_records
from mptrain.runs.train_loop import OnStep
from mptrain.training.setup import CoderRun

BLANK = {"train_seconds": 0.0, "wait_seconds": 0.0, "validation_seconds": 0.0}
BLANK |= {"rows_per_second": 0.0, "peak_memory_bytes": 0}


def interrupt_at(step: int) -> OnStep:
    """Raise KeyboardInterrupt in place of this train step, counted from 1 over all passes."""
    calls = 0

    def on_step(_: int, __: Sequence[CoderRun]) -> None:
        nonlocal calls
        calls += 1
        if calls == step:
            raise KeyboardInterrupt

    return on_step


def spoil(coder_run: CoderRun) -> None:
    """Let a coder diverge in its next train step."""
    coder_run.trainer.coder.b_D.data.fill_(float("nan"))


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


def equal(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return weights.keys() == expected.keys() and all(
        torch.equal(weights[n], expected[n]) for n in weights
    )


def lasting(run: Path) -> list[Record]:
    """Records without the fields that depend on the clock and the process."""
    records = [dataclasses.asdict(r) for r in read_records(run / "metrics.jsonl")]
    return [Record(**{**r, **BLANK}) for r in records]


def state(run: Path) -> dict[str, torch.Tensor]:
    """Tensors of the last saved state."""
    (folder,) = (f for f in (run / "state").iterdir() if f.name.isdecimal())
    return load_file(folder / "state.safetensors")
