"""Search for the next atom, step by step on whole matrices: three back ends with one contract.

A back end sees one micro-batch: `best(r, step)` returns the latent that each row chooses in a
step; then `subtract_(a)` reports that `a` times these latents' rows was subtracted from the
residuals.

b rows of one micro-batch, D input width, M latents, S candidates of a shortlist, R pursuit steps
from one shortlist to the next.
"""

import torch
from torch import Tensor

from mptrain.pursuit.rule import N_RESCORED, Rule


class Direct:
    """Computes every score at every step: `2 D M` operations a row and step. The reference."""

    def __init__(self, W_MD: Tensor, rule: Rule) -> None:
        assert rule.block is None or len(W_MD) % rule.block == 0
        self.W_MD, self.rule = W_MD, rule

    def best(self, r_bD: Tensor, step: int) -> Tensor:
        W_MD, first = self.W_MD, self.rule.first_latent(step)
        if self.rule.block is not None:
            W_MD = W_MD[first % len(W_MD) :][: self.rule.block]
        return self._best_column(r_bD, W_MD, step) + first

    def _best_column(self, r_bD: Tensor, W_mD: Tensor, step: int) -> Tensor:
        if step == 0:
            self.score_bm = r_bD.new_empty(len(r_bD), len(W_mD))
        return self.rule.best(torch.mm(r_bD, W_mD.T, out=self.score_bm))

    def subtract_(self, a_b: Tensor) -> None:
        """The next residual tells."""


class Gram:
    """Keeps the scores and subtracts `a G[j]`, `G = U W^T`: `2 M` operations a row and step.

    Exact up to rounding; with `G` in bfloat16, the few best are scored again at every step.
    """

    def __init__(self, W_MD: Tensor, G_MM: Tensor, rule: Rule) -> None:
        self.W_MD, self.G_MM, self.rule = W_MD, G_MM, rule

    def best(self, r_bD: Tensor, step: int) -> Tensor:
        if step == 0:
            self.score_bM = r_bD @ self.W_MD.T
            self.row_bM = torch.empty_like(self.score_bM, dtype=self.G_MM.dtype)
        if self.G_MM.dtype != self.W_MD.dtype:
            self._score_few_again_(r_bD)
        self.atom_b = self.rule.best(self.score_bM)
        return self.atom_b

    def subtract_(self, a_b: Tensor) -> None:
        torch.index_select(self.G_MM, 0, self.atom_b, out=self.row_bM)
        self.score_bM.addcmul_(self.row_bM, a_b[:, None], value=-1)  # in the dtype of the scores

    def _score_few_again_(self, r_bD: Tensor) -> None:
        atom_bF = self.rule.candidates(self.score_bM, min(N_RESCORED, len(self.W_MD)))
        w_bFD = self.W_MD[atom_bF]
        self.score_bM.scatter_(1, atom_bF, torch.bmm(w_bFD, r_bD[:, :, None])[:, :, 0])


class Shortlist:
    """Approximate: scores all atoms every R steps and looks only at the best S in between.

    `scoring_MD` is `W`, or `W` in bfloat16. The S are scored exactly at every step. A step differs
    from `direct` where the best atom was not among the S best when all were scored last.
    """

    def __init__(
        self, W_MD: Tensor, scoring_MD: Tensor, size: int, refresh: int, rule: Rule
    ) -> None:
        self.W_MD, self.scoring_MD, self.rule = W_MD, scoring_MD, rule
        self.size, self.refresh = size, refresh

    def best(self, r_bD: Tensor, step: int) -> Tensor:
        if step % self.refresh == 0:
            self._refresh(r_bD)
        score_bS = torch.bmm(self.w_bSD, r_bD[:, :, None])[:, :, 0]
        return self.atom_bS.gather(1, self.rule.best(score_bS)[:, None])[:, 0]

    def subtract_(self, a_b: Tensor) -> None:
        """The next residual tells."""

    def _refresh(self, r_bD: Tensor) -> None:
        score_bM = (r_bD.to(self.scoring_MD.dtype) @ self.scoring_MD.T).to(r_bD.dtype)
        # in the order of the atoms, so that a tie is decided as in `direct`
        self.atom_bS = self.rule.candidates(score_bM, self.size)
        w_nD = self.W_MD.index_select(0, self.atom_bS.flatten())
        self.w_bSD = w_nD.view(*self.atom_bS.shape, self.W_MD.shape[1])
