"""How the next atom is found: three back ends with one contract.

A back end sees one micro-batch: `best(r, step)` gives `argmax_j <w_j, r>` of each row, or what it
takes for it, then `subtract_(a)` tells that `a` times these atoms was taken from the residuals.

b rows of one micro-batch, D input width, M latents, S candidates of a shortlist, R pursuit steps
from one shortlist to the next, n rows whose candidates are compared at once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_CPU_PIECE = 1 << 19  # elements of candidates gathered at once: a core's share stays in its L2
_GPU_PIECE = 1 << 28
_GROUP = 16  # latents whose best score stands for them while the S best are looked for


class Direct:
    """Computes every score anew: `2 D M` operations a row and step. The reference."""

    def __init__(self, W_MD: Tensor) -> None:
        self.W_MD = W_MD

    def best(self, r_bD: Tensor, step: int) -> Tensor:
        if step == 0:
            self.score_bM = r_bD.new_empty(len(r_bD), len(self.W_MD))
        return argmax(torch.mm(r_bD, self.W_MD.T, out=self.score_bM))

    def subtract_(self, a_b: Tensor) -> None:
        """The next residual tells."""


class Gram:
    """Keeps the scores and subtracts `a G[j]`, `G = W W^T`: `2 M` operations a row and step.

    Exact up to rounding.
    """

    def __init__(self, W_MD: Tensor, G_MM: Tensor) -> None:
        self.W_MD, self.G_MM = W_MD, G_MM

    def best(self, r_bD: Tensor, step: int) -> Tensor:
        if step == 0:
            self.score_bM = r_bD @ self.W_MD.T
            self.row_bM = torch.empty_like(self.score_bM)
        self.atom_b = argmax(self.score_bM)
        return self.atom_b

    def subtract_(self, a_b: Tensor) -> None:
        torch.index_select(self.G_MM, 0, self.atom_b, out=self.row_bM)
        self.score_bM.addcmul_(self.row_bM, a_b[:, None], value=-1)


class Shortlist:
    """Approximate: scores all atoms every R steps and looks only at the best S in between.

    Scores of the S are exact up to rounding. A step differs from `direct` where the best atom was
    not among the S best when all were scored last.
    """

    def __init__(self, everything: "AllAnew | AllByGram", size: int, refresh: int) -> None:
        self.everything, self.size, self.refresh = everything, size, refresh

    def best(self, r_bD: Tensor, step: int) -> Tensor:
        if step % self.refresh == 0:
            if step == 0:
                self.everything.start(r_bD)
            # in the order of the atoms, so that a tie is decided as in `direct`
            atom_bS = largest(self.everything.scores(r_bD), self.size).sort(1).values
            self.score_bS = self.everything.look_at(atom_bS, r_bD)
            self.atom_bS = atom_bS
        self.place_b = argmax(self.score_bS)
        return self.atom_bS.gather(1, self.place_b[:, None])[:, 0]

    def subtract_(self, a_b: Tensor) -> None:
        self.score_bS.addcmul_(self.everything.took(self.place_b, a_b), a_b[:, None], value=-1)


class AllAnew:
    """Scores of all atoms from the residual: `2 D M` operations a row and shortlist.

    `scoring_MD` is `W`, or `W` in bfloat16: what is chosen in it is scored again in `W`'s dtype.
    The Gram matrix is made of the candidates alone, `2 D S^2` operations a row and shortlist.
    """

    def __init__(self, W_MD: Tensor, scoring_MD: Tensor) -> None:
        self.W_MD, self.scoring_MD = W_MD, scoring_MD

    def start(self, r_bD: Tensor) -> None:
        self.row_b = torch.arange(len(r_bD), device=r_bD.device)

    def scores(self, r_bD: Tensor) -> Tensor:
        return r_bD.to(self.scoring_MD.dtype) @ self.scoring_MD.T

    def look_at(self, atom_bS: Tensor, r_bD: Tensor) -> Tensor:
        """The candidates' scores; keeps their Gram matrices."""
        self.gram_bSS, score_bS = _products(self.W_MD, atom_bS, r_bD)
        return score_bS

    def took(self, place_b: Tensor, a_b: Tensor) -> Tensor:
        """The candidates' products with the candidate at `place`, which was chosen."""
        return self.gram_bSS[self.row_b, place_b]


class AllByGram:
    """Scores of all atoms kept, and brought up to date by the rows of `G` of the atoms since."""

    def __init__(self, W_MD: Tensor, G_MM: Tensor) -> None:
        self.W_MD, self.G_MM = W_MD, G_MM

    def start(self, r_bD: Tensor) -> None:
        self.score_bM = r_bD @ self.W_MD.T
        self.taken: list[tuple[Tensor, Tensor]] = []

    def scores(self, r_bD: Tensor) -> Tensor:
        if self.taken:
            idx_bR, val_bR = (torch.stack(t, 1) for t in zip(*self.taken, strict=True))
            self.score_bM -= F.embedding_bag(
                idx_bR, self.G_MM, per_sample_weights=val_bR, mode="sum"
            )
            self.taken = []
        return self.score_bM

    def look_at(self, atom_bS: Tensor, r_bD: Tensor) -> Tensor:
        """The candidates' scores."""
        self.atom_bS = atom_bS
        return self.score_bM.gather(1, atom_bS)

    def took(self, place_b: Tensor, a_b: Tensor) -> Tensor:
        """The candidates' products with the candidate at `place`; keeps that it was chosen."""
        atom_b1 = self.atom_bS.gather(1, place_b[:, None])
        self.taken.append((atom_b1[:, 0], a_b))
        return self.G_MM.view(-1).take(atom_b1 * len(self.G_MM) + self.atom_bS)


def argmax(score_bM: Tensor) -> Tensor:
    """First largest score of each row. NumPy's is 8 to 24 x faster than torch's on a CPU."""
    if score_bM.device.type == "cpu":
        return torch.from_numpy(score_bM.numpy().argmax(1))
    return score_bM.argmax(1)


def largest(score_bM: Tensor, size: int) -> Tensor:
    """Indices of the `size` largest scores of each row, in no promised order.

    They lie in the `size` groups with the largest maxima, so that two small searches do for one
    over everything, several times faster on a CPU.
    """
    if score_bM.shape[1] < 2 * size * _GROUP:
        return score_bM.topk(size, sorted=False).indices
    score_bM = F.pad(score_bM, (0, -score_bM.shape[1] % _GROUP), value=-torch.inf)
    score_bgN = score_bM.view(len(score_bM), _GROUP, -1)  # a group's latents are N apart
    group_bS = score_bgN.amax(1).topk(size, sorted=False).indices
    in_groups_bgS = score_bgN.gather(2, group_bS[:, None].expand(-1, _GROUP, -1))
    place_bS = in_groups_bgS.flatten(1).topk(size, sorted=False).indices
    stride = score_bgN.shape[2]
    return group_bS.gather(1, place_bS % size) + place_bS.div(size, rounding_mode="floor") * stride


def _products(W_MD: Tensor, atom_bS: Tensor, r_bD: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices of each row's candidates, and their scores, in pieces that fit a CPU's cache.

    The residual takes part as one more candidate: one product gives both.
    """
    b, S = atom_bS.shape
    elements = _CPU_PIECE if r_bD.device.type == "cpu" else _GPU_PIECE
    rows = max(1, elements // ((S + 1) * W_MD.shape[1]))
    products_bTT = r_bD.new_empty(b, S + 1, S + 1)
    for atom_nS, r_nD, products_nTT in zip(
        *(torch.split(t, rows) for t in (atom_bS, r_bD, products_bTT)), strict=True
    ):
        w_nSD = W_MD.index_select(0, atom_nS.flatten()).view(*atom_nS.shape, -1)
        all_nTD = torch.cat([w_nSD, r_nD[:, None]], 1)
        torch.bmm(all_nTD, all_nTD.transpose(1, 2), out=products_nTT)
    return products_bTT[:, :S, :S], products_bTT[:, S, :S].contiguous()
