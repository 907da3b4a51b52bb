"""One coder in training: its state, and one train step.

B rows in a batch, D input width, E target width, M latents, K code entries a row;
lower-case b: rows of one micro-batch.
"""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mptrain.coders.code import Code
from mptrain.coders.coder import Coder, coder_from_tensors
from mptrain.training.distributed import SINGLE_PROCESS, ProcessGroup
from mptrain.training.latent_usage import LatentUsage
from mptrain.training.normalization import IDENTITY, Scale, for_unscaled_rows
from mptrain.training.objective import WIDE, Objective
from mptrain.training.optimizers import Optimizers
from mptrain.training.schedules import coded_as, k_at
from mptrain.training.step_result import BatchStatistics, StepResult


class CoderTrainer:
    """A coder with its optimizers, its objective and the usage of its latents."""

    def __init__(
        self,
        coder: Coder,
        optimizers: Optimizers,
        total_variance: float,
        input_variance: float | None = None,
        scale: Scale = IDENTITY,
        processes: ProcessGroup = SINGLE_PROCESS,
        *,
        dead_rows: int,
    ) -> None:
        """Variances are those of `Objective`, of unscaled rows; the coder is for scaled rows.

        A latent that has not fired in `dead_rows` rows is dead.
        """
        self.coder = coder
        self.optimizers = optimizers
        self.scale = scale
        self.dead_rows = dead_rows
        self._processes = processes
        total_variance *= scale.target**2
        if input_variance is not None:
            input_variance *= scale.input**2
        self.objective = Objective(coder, total_variance, input_variance)
        self.usage = LatentUsage(coder.latents, coder.b_D.device)
        self._set_coding_()

    def step(
        self, x_BD: Float[Tensor, "batch input"], y_BE: Float[Tensor, "batch target"]
    ) -> StepResult:
        """Update the coder, its optimizers and its latent usage once; for an SAE `y` is `x`.

        Gradients of micro-batches sum to the gradient of the batch. What depends on the whole batch
        stays so: which latents are dead before the step, and which fire in it. The exception are
        batch- coders: they keep the strongest entries of each micro-batch.
        Where processes divide rows, `x` and `y` are the share of this process.

        Does not wait for the device, except in the auxiliary loss, which counts dead latents.
        """
        x_BD, y_BE = self.scale.applied(x_BD, y_BE)
        rows = self._processes.sum(len(x_BD))
        dead_M = self.usage.dead_M(self.dead_rows)
        statistics = BatchStatistics(y_BE, rows, self._processes)
        for x_bD, y_bE in self._micro_batches(x_BD, y_BE):
            loss, y_hat_bE, code = self._add_gradient_(x_bD, y_bE, dead_M, len(x_bD) / rows)
            statistics.add(loss, y_bE, y_hat_bE, code)
        self._sum_gradients_()
        self.coder.project_gradient_()
        self.optimizers.step_()
        self._set_coding_()
        self.coder.normalise_()
        self.usage.update_(statistics.codes, rows, self._processes)
        return statistics.result()

    def compile_kernels(self, x_BD: Tensor, y_BE: Tensor) -> None:
        """Compute a step's gradients and drop them, because kernels compile at their first use."""
        x_BD, y_BE = self.scale.applied(x_BD, y_BE)
        dead_M = self.usage.dead_M(self.dead_rows)
        for x_bD, y_bE in self._micro_batches(x_BD, y_BE):
            self._add_gradient_(x_bD, y_bE, dead_M, 1.0)
        for parameter in self.coder.parameters():
            parameter.grad = None

    def _micro_batches(self, x_BD: Tensor, y_BE: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if len(x_BD):  # a process may have no row of a batch
            size = self.coder.config.micro_batch_rows or len(x_BD)
            yield from zip(torch.split(x_BD, size), torch.split(y_BE, size), strict=True)

    def _add_gradient_(
        self, x_bD: Tensor, y_bE: Tensor, dead_M: Tensor, share: float
    ) -> tuple[Tensor, Tensor, Code]:
        """Add the gradient of a micro-batch, which is this share of its batch.

        Returns its share of the loss, its predictions and its codes, without gradients.
        """
        code = self._encode(x_bD, 1)
        y_hat_bE = self.coder.predict(code, x_bD)
        loss = self.objective.loss(code, x_bD, y_bE, y_hat_bE, dead_M)
        if self.coder.config.multi_topk:
            loss = loss + self.objective.wide_loss(self._encode(x_bD, WIDE), x_bD, y_bE)
        loss = share * loss
        # torch does not annotate `backward`
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), y_hat_bE.detach(), code.detached()

    def _sum_gradients_(self) -> None:
        """Sum each gradient over processes; a parameter that no process used has no gradient."""
        if not self._processes.divides_rows:
            return
        trained = [p for p in self.coder.parameters() if p.requires_grad]
        users = self._processes.all_reduce_(
            torch.tensor([int(p.grad is not None) for p in trained])
        )
        for parameter, count in zip(trained, users.tolist(), strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self._processes.all_reduce_(parameter.grad)

    def evaluated(self) -> Coder:
        """Return the coder to evaluate and save: for unscaled rows, with averaged weights if any.

        Shares with the training all tensors that are equal in both, and changes none of them. The
        threshold of a batch- coder is not set.
        """
        trained = {name: tensor.detach() for name, tensor in self.optimizers.averages().items()}
        tensors = for_unscaled_rows({**self.coder.state_dict(), **trained}, self.scale)
        coder = coder_from_tensors(self.coder.config, tensors)
        coder.encoder.coded_as = self.coder.encoder.coded_as
        return coder

    def _encode(self, x_BD: Tensor, times: int) -> Code:
        """Encode as the schedule says for this train step, with `times` as many entries per row."""
        config, step, steps = self.coder.config, self.optimizers.steps_done, self.optimizers.steps
        k = k_at(config, step, steps)
        k = None if k is None else min(times * k, self.coder.latents)
        return self.coder.encode(x_BD, k, over_batch=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return all tensors that change in training, by name: the live tensors, not copies."""
        return {
            "rows_since_fired_M": self.usage.rows_since_fired_M,
            **{f"coder.{name}": tensor for name, tensor in self.coder.state_dict().items()},
            **{f"optimizer.{name}": t for name, t in self.optimizers.state_tensors().items()},
        }

    def load_state_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors of `state_tensors`; training then continues bit for bit."""
        self.usage.rows_since_fired_M.copy_(tensors["rows_since_fired_M"])
        self.coder.load_state_dict(_under("coder.", tensors))
        self.optimizers.load_state_tensors_(_under("optimizer.", tensors))
        self._set_coding_()

    def _set_coding_(self) -> None:
        optimizers = self.optimizers
        self.coder.encoder.coded_as = coded_as(
            self.coder.config, optimizers.steps_done, optimizers.steps
        )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
