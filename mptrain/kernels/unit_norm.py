"""Rows that are kept at unit norm: brought back to it, and gradients along their sphere.

M rows, D width.
"""

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def normalise_rows_(rows_MD: Float[Tensor, "rows width"]) -> None:
    """Divide each row by its norm: unit norm again, but for a few units in the last place."""
    rows_MD.div_(torch.linalg.vector_norm(rows_MD, dim=1, keepdim=True))


@torch.no_grad()
def project_rows_(gradient_MD: Float[Tensor, "rows width"], rows_MD: Tensor) -> None:
    """Remove from the gradient of each unit-norm row its component along the row."""
    along_M1 = torch.linalg.vecdot(gradient_MD, rows_MD)[:, None]
    gradient_MD.addcmul_(rows_MD, along_M1, value=-1)
