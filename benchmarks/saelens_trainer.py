"""SAELens' own trainer on the rows of a store, with its defaults for all but the sizes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tool_imports import import_quietly, without_output
from benchmarks.trainer_rows import StoreRows, TimedBatches, TrainedCoder
from benchmarks.trainer_settings import Setting, TrainedArch
from mptrain.training.objective import NESTED_SHARES

_CLASSES: dict[TrainedArch, str] = {
    "mp": "MatchingPursuitTrainingSAE",
    "topk": "TopKTrainingSAE",
    "batch-topk": "BatchTopKTrainingSAE",
    "matryoshka": "MatryoshkaBatchTopKTrainingSAE",
    "jumprelu": "JumpReLUTrainingSAE",
}
_NORM_BATCHES = 100  # at most, to estimate the mean norm of rows


def train(setting: Setting, rows: StoreRows, store: Path, work: Path) -> TrainedCoder | None:
    """Train, and load the coder that SAELens saves in `work` for use."""
    sae_lens = import_quietly("sae_lens")
    batches = TimedBatches(rows.batches())
    torch.manual_seed(setting.seed)
    with without_output():
        sae = make_coder(setting, rows.widths[0])
        trainer = make_trainer(setting, sae, rows, (x_BD for x_BD, _ in batches))
        if setting.normalise:
            _set_scale(trainer, rows)
        trainer.fit()
        batches.stop()
        # batch- coders become JumpReLU with the threshold that was followed in training
        sae.save_inference_model(work / "sae")
        saved = sae_lens.SAE.load_from_disk(work / "sae")

    @torch.no_grad()
    def code_rows(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        acts_BM = saved.encode(x_BD)
        return saved.decode(acts_BM), acts_BM != 0

    return TrainedCoder(code=code_rows, latents=setting.latents, train_seconds=batches.seconds)


def make_coder(setting: Setting, width: int) -> Any:
    """SAELens' coder before its training."""
    sae_lens = import_quietly("sae_lens")
    name = _CLASSES[setting.arch]
    scaling = "expected_average_only_in" if setting.normalise else "none"
    config = getattr(sae_lens, f"{name}Config")(
        d_in=width, d_sae=setting.latents, normalize_activations=scaling, **_options(setting)
    )
    return getattr(sae_lens, name)(config)


def make_trainer(setting: Setting, sae: Any, rows: StoreRows, x: Iterator[Tensor]) -> Any:
    """SAELens' trainer of a coder; `x` yields the rows of each train step."""
    trainers = import_quietly("sae_lens.training.sae_trainer")
    rate = {} if setting.lr is None else {"lr": setting.lr}
    config = trainers.SAETrainerConfig(
        total_training_samples=rows.count(), train_batch_size_samples=setting.batch_rows, **rate
    )
    config.lr_end = config.lr / 10  # as its runner sets it; a constant schedule does not use it
    return trainers.SAETrainer(cfg=config, sae=sae, data_provider=x)


def _options(setting: Setting) -> dict[str, Any]:
    """What SAELens has no default for, or a default that is not for this K."""
    if setting.arch == "mp":
        return {"max_iterations": setting.k}
    if setting.arch == "jumprelu":
        return {"l0_coefficient": setting.sparsity}
    if setting.arch == "matryoshka":
        widths = [round(share * setting.latents) for share in NESTED_SHARES]
        return {"k": setting.k, "matryoshka_widths": widths}
    return {"k": setting.k}


def _set_scale(trainer: Any, rows: StoreRows) -> None:
    """Estimate the scale from the first rows, which SAELens would otherwise take from training."""
    trainer.activation_scaler.estimate_scaling_factor(
        d_in=rows.widths[0],
        data_provider=(x_BD for x_BD, _ in rows.batches()),
        n_batches_for_norm_estimate=min(_NORM_BATCHES, rows.config.rows // rows.config.batch_rows),
    )
