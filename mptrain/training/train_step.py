"""One coder in training: its state, and one train step.

B rows in a batch, D input width, E target width, M latents, K code entries a row;
lower-case b: rows of one micro-batch.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mptrain.coders.code import Code
from mptrain.coders.coder import Coder, coder_from_tensors
from mptrain.kernels.sparse import active_latents
from mptrain.training.distributed import SINGLE_PROCESS, ProcessGroup
from mptrain.training.normalization import IDENTITY, Scale, for_unscaled_rows
from mptrain.training.objective import WIDE, Objective
from mptrain.training.optimizers import Optimizers
from mptrain.training.schedules import coded_as, k_at


class StepResult(NamedTuple):
    """What one train step saw, before its update. Reading a tensor waits for the device."""

    loss: Tensor
    "reconstruction and auxiliary loss; not finite: the parameters are spoilt, do not save them"
    fvu: Tensor
    "of this batch, by its own mean"
    l0: Tensor
    "mean number of distinct latents with a non-zero value"
    codes: list[Code]
    "of the micro-batches of this rank, without gradients and residuals"


class _Piece(NamedTuple):
    """What a micro-batch adds to its batch."""

    loss: Tensor
    squared_error: Tensor
    code: Code


class CoderTrainer:
    """A coder, its optimizers, and for how many rows each latent has not fired."""

    def __init__(
        self,
        coder: Coder,
        optimizers: Optimizers,
        total_variance: float,
        input_variance: float | None = None,
        scale: Scale = IDENTITY,
        ranks: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        """Variances as for `Objective`, of rows as they are; the coder is for `scale` of them."""
        self.coder = coder
        self.optimizers = optimizers
        self.scale, self.ranks = scale, ranks
        total_variance *= scale.target**2
        if input_variance is not None:
            input_variance *= scale.input**2
        self.objective = Objective(coder, total_variance, input_variance)
        self.rows_since_fired_M = torch.zeros(
            coder.latents, dtype=torch.int64, device=coder.b_D.device
        )
        self._follow_schedule_()

    def step(
        self, x_BD: Float[Tensor, "batch input"], y_BE: Float[Tensor, "batch target"]
    ) -> StepResult:
        """Update coder, optimizers and counters once; for an SAE `y` is `x`.

        Gradients of micro-batches add up to that of the batch. What the whole batch decides stays
        so: which latents are dead before it and which fired in it. But batch- coders keep the
        strongest of each micro-batch.
        Where ranks share rows, these are the rank's share, and as many micro-batches of the batch.

        Waits for no device but in the auxiliary loss, which counts the dead.
        """
        x_BD, y_BE = self.scale.applied(x_BD, y_BE)
        rows = self.ranks.total(len(x_BD))
        dead_M = self.dead_M(self.coder.config.dead_rows)
        pieces = [
            self._add_gradient_(x_bD, y_bE, dead_M, len(x_bD) / rows)
            for x_bD, y_bE in self._micro_batches(x_BD, y_BE)
        ]
        self._add_gradients_of_ranks_()
        self.coder.project_gradient_()
        self.optimizers.step_()
        self._follow_schedule_()
        self.coder.normalise_()
        self._count_fired_([piece.code for piece in pieces], rows)
        return self._result(pieces, y_BE, rows)

    def rehearse(self, x_BD: Tensor, y_BE: Tensor) -> None:
        """Go through a step's gradient and drop it: kernels are compiled at their first use."""
        x_BD, y_BE = self.scale.applied(x_BD, y_BE)
        dead_M = self.dead_M(self.coder.config.dead_rows)
        for x_bD, y_bE in self._micro_batches(x_BD, y_BE):
            self._add_gradient_(x_bD, y_bE, dead_M, 1.0)
        for parameter in self.coder.parameters():
            parameter.grad = None

    def _micro_batches(self, x_BD: Tensor, y_BE: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if len(x_BD):  # a rank may have no row
            size = self.coder.config.micro_batch_rows or len(x_BD)
            yield from zip(torch.split(x_BD, size), torch.split(y_BE, size), strict=True)

    def _add_gradient_(self, x_bD: Tensor, y_bE: Tensor, dead_M: Tensor, share: float) -> _Piece:
        """Add the gradient of a micro-batch that is such a share of its batch."""
        code = self._encode(x_bD, 1)
        y_hat_bE = self.coder.predict(code, x_bD)
        loss = self.objective.loss(code, x_bD, y_bE, y_hat_bE, dead_M)
        if self.coder.config.multi_topk:
            loss = loss + self.objective.wide_loss(self._encode(x_bD, WIDE), x_bD, y_bE)
        loss = share * loss
        # torch does not annotate `backward`
        loss.backward()  # type: ignore[no-untyped-call]
        squared_error = (y_bE - y_hat_bE.detach()).square().sum()
        return _Piece(loss.detach(), squared_error, code.detached())

    def _add_gradients_of_ranks_(self) -> None:
        """Make each gradient the sum over ranks; what none of them uses stays without."""
        if not self.ranks.shares_rows:
            return
        trained = [p for p in self.coder.parameters() if p.requires_grad]
        users = self.ranks.add_(torch.tensor([int(p.grad is not None) for p in trained]))
        for parameter, count in zip(trained, users.tolist(), strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self.ranks.add_(parameter.grad)

    def _result(self, pieces: list[_Piece], y_BE: Tensor, rows: int) -> StepResult:
        """Of the whole batch, but for the codes."""
        mean_E = self.ranks.add_(y_BE.sum(0)) / rows
        sums = y_BE.new_zeros(4, dtype=torch.float64)  # float32 cannot count all active latents
        sums[0] = (y_BE - mean_E).square().sum()
        for piece in pieces:
            sums[1] += piece.squared_error
            sums[2] += piece.loss
            sums[3] += active_latents(piece.code.idx_BK, piece.code.val_BK).sum()
        varied, squared_error, loss, active = self.ranks.add_(sums).unbind()
        fvu = squared_error.to(y_BE.dtype) / varied.to(y_BE.dtype)
        codes = [piece.code for piece in pieces]
        return StepResult(loss.to(y_BE.dtype), fvu, active / rows, codes)

    def evaluated(self) -> Coder:
        """The coder to evaluate and to save: averaged weights where the optimizer averages, and for
        rows as they are.

        Shares with the training all tensors that are the same in both; changes none of them. The
        threshold of a batch- coder has yet to be set.
        """
        trained = {name: tensor.detach() for name, tensor in self.optimizers.averages().items()}
        tensors = for_unscaled_rows({**self.coder.state_dict(), **trained}, self.scale)
        coder = coder_from_tensors(self.coder.config, tensors)
        coder.encoder.coded_as = self.coder.encoder.coded_as
        return coder

    def _encode(self, x_BD: Tensor, times: int) -> Code:
        """The code that is due in this train step, with so many times the entries."""
        config, step, steps = self.coder.config, self.optimizers.steps_done, self.optimizers.steps
        k = min(times * k_at(config, step, steps), self.coder.latents)
        return self.coder.encode(x_BD, k, over_batch=True)

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
        self.coder.encoder.coded_as = coded_as(
            self.coder.config, optimizers.steps_done, optimizers.steps
        )

    @torch.no_grad()
    def _count_fired_(self, codes: list[Code], rows: int) -> None:
        # one place more, in front, for the -1 of unused entries: no entry has to be picked out
        fired = self.rows_since_fired_M.new_zeros(self.coder.latents + 1)
        for code in codes:
            fired[code.idx_BK.flatten() + 1] = 1
        is_fired_M = self.ranks.add_(fired)[1:] > 0
        self.rows_since_fired_M.add_(rows).masked_fill_(is_fired_M, 0)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
