"""Optimizers of one coder, with their schedule and their state as named tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mpcache.errors import UsageError
from mptrain.coders.coder import Coder
from mptrain.config.coder import CoderConfig
from mptrain.training.schedule_free_signsgd import ScheduleFreeSignSGD
from mptrain.training.schedules import lr_factor

_COUNTER = "steps_done"


def make_optimizers(coder: Coder, config: CoderConfig, steps: int, lr: float) -> "Optimizers":
    """Return the optimizers of a coder for `steps` train steps with a peak learning rate.

    adam: Adam on all parameters. muon: Muon (Jordan 2024; RMS matched to AdamW, Liu et al. 2025,
    arXiv 2502.16982, sec. 2.2; weight decay 0.1) on matrices, Adam on vectors. Muon's
    Newton-Schulz iterations run on the short side of a matrix, torch transposes a tall one:
    `20 D^2 M` bfloat16 operations a train step for `[M, D]`, as many as scoring `10 D` rows once.
    signsgd: schedule-free SignSGD on all parameters; the coder then holds the points at which
    gradients are taken, and `Optimizers.averages` are the weights to evaluate and save.
    """
    trained = [p for p in coder.parameters() if p.requires_grad]
    if config.resolved_optimizer == "signsgd":
        return Optimizers(coder, [_signsgd(coder, lr)], config, steps, lr)
    if config.resolved_optimizer == "adam":
        return Optimizers(coder, [_adam(trained, lr)], config, steps, lr)
    matrices = [p for p in trained if p.ndim == 2]
    vectors = [p for p in trained if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = [_adam(vectors, lr)] if vectors else []
    return Optimizers(coder, [muon, *adam], config, steps, lr)


class Optimizers:
    """All optimizers of a coder, on one schedule of learning rates."""

    def __init__(
        self,
        coder: Coder,
        optimizers: list[torch.optim.Optimizer],
        config: CoderConfig,
        steps: int,
        peak_lr: float,
    ) -> None:
        self.steps_done = 0
        self.peak_lr = peak_lr
        self.steps = steps
        self._config = config
        self._optimizers = optimizers
        self._parameters = {n: p for n, p in coder.named_parameters() if p.requires_grad}

    @property
    def lr(self) -> float:
        """Learning rate of the next train step."""
        config = self._config
        plan = (config.resolved_warmup_share, config.resolved_schedule, config.decay_share)
        return self.peak_lr * lr_factor(self.steps_done, self.steps, *plan)

    def step_(self) -> None:
        """Update every parameter by its gradient, and drop the gradients."""
        if self._config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._config.clip_norm)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1

    def averages(self) -> dict[str, Tensor]:
        """Return averaged weights by name: live tensors; empty if the optimizer has none."""
        return {
            name: owner.average(parameter)
            for name, parameter in self._parameters.items()
            if isinstance(owner := self._owner(parameter), ScheduleFreeSignSGD)
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """Return `<parameter>.<moment>` and `steps_done`: the live tensors, not copies."""
        moments = {
            f"{name}.{key}": tensor
            for name, parameter in self._parameters.items()
            for key, tensor in self._owner(parameter).state.get(parameter, {}).items()
        }
        return {_COUNTER: torch.tensor(self.steps_done), **moments}

    def load_state_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors of `state_tensors`; training then continues bit for bit.

        Raises:
            UsageError: the tensors are of another coder.
        """
        self.steps_done = int(tensors[_COUNTER])
        for parameter in self._parameters.values():
            self._owner(parameter).state.pop(parameter, None)
        for full_name in tensors.keys() - {_COUNTER}:
            name, _, key = full_name.rpartition(".")
            if name not in self._parameters:
                raise UsageError(
                    f"the optimizer state belongs to another coder: it holds {full_name}, but this "
                    f"coder has only {', '.join(self._parameters)}; load the state of this coder"
                )
            parameter = self._parameters[name]
            tensor = tensors[full_name].to(parameter.device, copy=True)
            self._owner(parameter).state[parameter][key] = tensor

    def _owner(self, parameter: Tensor) -> torch.optim.Optimizer:
        return next(
            optimizer
            for optimizer in self._optimizers
            if any(parameter is p for group in optimizer.param_groups for p in group["params"])
        )


def _adam(parameters: list[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    # one fused pass over parameter, gradient and moments, also on a CPU
    return torch.optim.Adam(parameters, lr, fused=True)


def _signsgd(coder: Coder, lr: float) -> torch.optim.Optimizer:
    groups = [
        {"params": params, "unit_norm": unit_norm}
        for unit_norm in (False, True)
        if (
            params := [
                parameter
                for name, parameter in coder.named_parameters()
                if parameter.requires_grad and (name in coder.unit_norm) == unit_norm
            ]
        )
    ]
    return ScheduleFreeSignSGD(groups, lr)
