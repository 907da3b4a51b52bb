"""sparsify's own trainer on the rows of a store.

Its trainer runs a language model and takes rows from hooks on a module. Here the model has a single
module, whose input and output are the rows of the next batch; its "tokens" number these rows.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tool_imports import import_quietly, without_output
from benchmarks.trainer_rows import StoreRows, TimedBatches, TrainedCoder
from benchmarks.trainer_settings import Setting

_MODULE = "rows"


def train(setting: Setting, rows: StoreRows, store: Path, work: Path) -> TrainedCoder | None:
    """Train, and load the coder that sparsify saves in `work`."""
    # its decoder for GPUs would be taken wherever triton is installed
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    sparsify = import_quietly("sparsify")
    model = StoreModel(TimedBatches(rows.batches()), rows.widths)
    dataset = _BatchNumbers(model, setting.steps)
    with without_output(), _kept_matmul_precision():
        make_trainer(setting, model, dataset, work).fit()
        model.batches.stop()
        # saved with averaged weights, because its default optimizer averages them
        coder = sparsify.SparseCoder.load_from_disk(work / "run" / _MODULE)

    @torch.no_grad()
    def code_rows(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        with without_output():  # its autocast warns where there is no GPU
            output = coder(x_BD)
        active_BM = torch.zeros(len(x_BD), setting.latents, dtype=torch.bool)
        active_BM.scatter_(1, output.latent_indices, output.latent_acts != 0)
        return output.sae_out, active_BM

    return TrainedCoder(
        code=code_rows, latents=setting.latents, train_seconds=model.batches.seconds
    )


def make_trainer(setting: Setting, model: nn.Module, dataset: Any, work: Path) -> Any:
    """sparsify's trainer with its defaults for all but the sizes."""
    sparsify = import_quietly("sparsify")
    coder = sparsify.SparseCoderConfig(
        num_latents=setting.latents,
        k=setting.k,
        transcode=setting.kind != "sae",
        skip_connection=setting.kind == "skip-transcoder",
    )
    config = sparsify.TrainConfig(
        coder,
        batch_size=1,  # sequences; a batch of rows is one of them
        lr=setting.lr,
        hookpoints=[_MODULE],
        init_seeds=[setting.seed],
        log_to_wandb=False,
        save_every=setting.steps + 1,
        save_dir=str(work),
        run_name="run",
    )
    return sparsify.Trainer(config, dataset, model)


class StoreModel(nn.Module):
    """As much of a model of transformers as the trainer asks for."""

    device = torch.device("cpu")

    def __init__(self, batches: TimedBatches, widths: tuple[int, int]) -> None:
        super().__init__()
        self.batches = batches
        self.rows = _RowsModule()
        self._x_1BD, self.rows.y_1BE = (torch.zeros(1, 1, width) for width in widths)

    @property
    def base_model(self) -> "StoreModel":
        return self

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """For the widths of modules, which the trainer finds by a forward pass."""
        return {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

    def forward(self, input_ids: Tensor) -> None:
        self.rows(self._x_1BD)

    def next_batch_(self) -> int:
        """Take the next batch; the number of its rows."""
        x_BD, y_BE = next(self.batches)
        self._x_1BD, self.rows.y_1BE = x_BD[None], y_BE[None]
        return len(x_BD)


class _RowsModule(nn.Module):
    """The module that is hooked: its output are the target rows of the batch."""

    y_1BE: Tensor

    def forward(self, x_1BD: Tensor) -> Tensor:
        return self.y_1BE


class _BatchNumbers:
    """A dataset whose every item is a sequence of the numbers of a batch's rows."""

    def __init__(self, model: StoreModel, steps: int) -> None:
        self._model, self._steps = model, steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.arange(self._model.next_batch_())}


@contextlib.contextmanager
def _kept_matmul_precision() -> Iterator[None]:
    """The trainer lowers the precision of all matrix products in the process."""
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
