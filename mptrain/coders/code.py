"""The code of a batch: which latents are active in each row, and their values."""

from typing import NamedTuple

from torch import Tensor


class Code(NamedTuple):
    """Sparse codes of B rows with K entries each. Entries of a row that name the same latent add.

    An unused entry has index -1 and value 0.
    """

    idx_BK: Tensor
    "`[B, K]` int64 latents; of a pursuit, in the order of its steps"
    val_BK: Tensor
    "`[B, K]` values; negative ones come from select signed and magnitude, and from omp"
    residual_BD: Tensor | None = None
    "`[B, D]` part of the input that a pursuit leaves; None for other encoders"
    penalised_BM: Tensor | None = None
    "`[B, M]` what the sparsity loss of an encoder adds up, with gradients"

    def detached(self) -> "Code":
        """The active entries alone, without gradients: what may be kept of many rows.

        Entries of value 0 are active in pursuits only. Encoders with a sparsity loss use others of
        them for gradients.
        """
        val_BK = self.val_BK.detach()
        if self.penalised_BM is None:
            return Code(self.idx_BK, val_BK)
        return Code(self.idx_BK.masked_fill(val_BK == 0, -1), val_BK)
