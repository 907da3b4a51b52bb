"""One coder in training: its state, and one train step.

B rows in a batch, D input width, E target width, M latents.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mptrain.coder import Code, Coder
from mptrain.loss import batch_fvu
from mptrain.objective import WIDE, Objective
from mptrain.optimize import Optimizers
from mptrain.schedule import available_latents, coded_as, k_at
from mptrain.sparse import active_latents


class StepResult(NamedTuple):
    """What one train step saw, before its update. Reading a tensor waits for the device."""

    loss: Tensor
    "reconstruction and auxiliary loss; not finite: the parameters are spoilt, do not save them"
    fvu: Tensor
    "of this batch, by its own mean"
    code: Code
    "of this batch, without gradients"

    @property
    def l0(self) -> Tensor:
        """Mean number of distinct latents with a non-zero value."""
        return active_latents(self.code.idx_BK, self.code.val_BK).double().mean()


class Learner:
    """A coder, its optimizers, and for how many rows each latent has not fired."""

    def __init__(
        self,
        coder: Coder,
        optimizers: Optimizers,
        total_variance: float,
        input_variance: float | None = None,
    ) -> None:
        """Variances as for `Objective`."""
        self.coder = coder
        self.optimizers = optimizers
        self.objective = Objective(coder, total_variance, input_variance)
        self.rows_since_fired_M = torch.zeros(
            coder.latents, dtype=torch.int64, device=coder.b_D.device
        )
        self._follow_schedule_()

    def step(
        self, x_BD: Float[Tensor, "batch input"], y_BE: Float[Tensor, "batch target"]
    ) -> StepResult:
        """Update coder, optimizers and counters once; for an SAE `y` is `x`.

        Waits for no device but in the auxiliary loss, which counts the dead.
        """
        config = self.coder.config
        code = self._encode(x_BD, 1)
        y_hat_BE = self.coder.predict(code, x_BD)
        loss = self.objective.loss(code, x_BD, y_BE, y_hat_BE, self.dead_M(config.dead_rows))
        if config.multi_topk:
            loss = loss + self.objective.wide_loss(self._encode(x_BD, WIDE), x_BD, y_BE)
        # torch does not annotate `backward`
        loss.backward()  # type: ignore[no-untyped-call]
        self.coder.project_gradient_()
        self.optimizers.step_()
        self._follow_schedule_()
        self.coder.normalise_()
        self.coder.follow_threshold_(code)
        self._count_fired_(code)
        residual_BD = None if code.residual_BD is None else code.residual_BD.detach()
        code = Code(code.idx_BK, code.val_BK.detach(), residual_BD)
        return StepResult(loss.detach(), batch_fvu(y_BE, y_hat_BE.detach()), code)

    def _encode(self, x_BD: Tensor, times: int) -> Code:
        """The code that is due in this train step, with so many times the entries."""
        config, step, steps = self.coder.config, self.optimizers.steps_done, self.optimizers.steps
        k = min(times * k_at(config, step, steps), self.coder.latents)
        among_m = available_latents(config, self.coder.latents, step)
        if among_m is not None:
            among_m = among_m.to(x_BD.device)
        return self.coder.encode(x_BD, k, over_batch=True, among_m=among_m)

    def dead_M(self, dead_rows: int) -> Tensor:
        """Which latents did not fire in the last `dead_rows` rows."""
        return self.rows_since_fired_M >= dead_rows

    def dead_share(self, dead_rows: int) -> Tensor:
        """Share of latents that are dead; a tensor, so that nothing waits."""
        return self.dead_M(dead_rows).double().mean()

    def state_tensors(self) -> dict[str, Tensor]:
        """All that changes in training, by name: the live tensors, not copies."""
        return {
            "rows_since_fired_M": self.rows_since_fired_M,
            **{f"coder.{name}": tensor for name, tensor in self.coder.state_dict().items()},
            **{f"optimizer.{name}": t for name, t in self.optimizers.state_tensors().items()},
        }

    def load_state_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue bit for bit from what `state_tensors` gave."""
        self.rows_since_fired_M.copy_(tensors["rows_since_fired_M"])
        self.coder.load_state_dict(_under("coder.", tensors))
        self.optimizers.load_state_tensors_(_under("optimizer.", tensors))
        self._follow_schedule_()

    def _follow_schedule_(self) -> None:
        optimizers = self.optimizers
        self.coder.coded_as = coded_as(self.coder.config, optimizers.steps_done, optimizers.steps)

    @torch.no_grad()
    def _count_fired_(self, code: Code) -> None:
        # one place more, in front, for the -1 of unused entries: no entry has to be picked out
        fired = torch.zeros(self.coder.latents + 1, dtype=torch.bool, device=code.idx_BK.device)
        fired[code.idx_BK.flatten() + 1] = True
        self.rows_since_fired_M.add_(len(code.idx_BK)).masked_fill_(fired[1:], 0)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
