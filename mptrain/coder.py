"""A coder: its parameters, its codes and its predictions.

B rows in a batch, D input width, E target width, M latents, K code entries a row.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mptrain.config import CoderConfig
from mptrain.pursuit.pursue import pursue
from mptrain.sparse import sparse_decode
from mptrain.topk import predict_error, topk_encode


class Code(NamedTuple):
    """Codes of a batch. Entries of one row that name the same latent add."""

    idx_BK: Tensor
    "int64 latents, in the order of the pursuit for mp; -1: unused"
    val_BK: Tensor
    "values, positive where used and 0 where not"
    residual_BD: Tensor | None
    "what the pursuit left of the input (mp only)"


class Coder(nn.Module):
    """An SAE or transcoder with the parameters of its kind and architecture.

    | parameter | who has it | start (`initialise_`) |
    |---|---|---|
    | `b_D` input bias | all | mean input |
    | `c_E` output bias | transcoders; an SAE's is `b_D` | mean target |
    | `W_MD` dictionary, unit norm | mp | Gaussian directions |
    | `encoder_MD`, `encoder_bias_M` | topk | Gaussian directions, 0 |
    | `V_ME` decoder, unit norm | topk SAE; the mp SAE's is `W_MD` | the encoder |
    | `V_ME` decoder, free norm | transcoders | 0 |
    | `S_ED` linear skip (Paulo et al. 2025, arXiv 2501.18823) | skip-transcoder | 0 |

    A new coder holds zeros: call `initialise_`, or load its state.
    """

    def __init__(self, config: CoderConfig, input_width: int, target_width: int) -> None:
        super().__init__()
        D, E, M = input_width, target_width, config.expansion * input_width
        sae, mp, skip = config.kind == "sae", config.arch == "mp", config.kind == "skip-transcoder"
        if sae and D != E:
            raise ValueError(
                f"an sae codes rows of one width, got input_width={D}, target_width={E}; "
                "use a transcoder"
            )
        self.config = config
        self.latents = M
        self.checked_k(config.k)
        self.b_D = _zeros(D)
        self.c_E = None if sae else _zeros(E)
        self.W_MD = _zeros(M, D) if mp else None
        self.encoder_MD = None if mp else _zeros(M, D)
        self.encoder_bias_M = None if mp else _zeros(M)
        self.V_ME = None if sae and mp else _zeros(M, E)
        self.S_ED = _zeros(E, D) if skip else None

    @property
    def unit_norm(self) -> tuple[str, ...]:
        """Names of the parameters whose rows are kept at unit norm."""
        if self.config.arch == "mp":
            return ("W_MD",)
        return ("V_ME",) if self.config.kind == "sae" else ()

    @property
    def decoder_ME(self) -> Tensor:
        """A row for each latent: what it adds to the prediction."""
        decoder = self.W_MD if self.V_ME is None else self.V_ME
        assert decoder is not None
        return decoder

    @property
    def output_bias_E(self) -> Tensor:
        return self.b_D if self.c_E is None else self.c_E

    def encode(self, x_BD: Float[Tensor, "batch input"], k: int | None = None) -> Code:
        """Codes with `k` entries a row (None: as trained). Raises ValueError unless 0 < k <= M."""
        k = self.config.k if k is None else self.checked_k(k)
        if self.W_MD is not None:
            config = self.config
            return Code(*pursue(x_BD - self.b_D, self.W_MD, k, config.tolerance, config.backend))
        return Code(*topk_encode(x_BD, self.b_D, *self._encoder(), k), residual_BD=None)

    def decode(self, code: Code, x_BD: Float[Tensor, "batch input"]) -> Float[Tensor, "batch out"]:
        """`c + sum_k val_k v_k (+ S x)`; without a skip `x` does not matter."""
        y_BE = sparse_decode(code.idx_BK, code.val_BK, self.decoder_ME) + self.output_bias_E
        return y_BE if self.S_ED is None else y_BE + x_BD.to(y_BE.dtype) @ self.S_ED.T

    def predict(self, code: Code, x_BD: Float[Tensor, "batch input"]) -> Float[Tensor, "batch out"]:
        """`decode` of a code that `encode` made of `x`; for an mp SAE the free `x - residual`."""
        if self.V_ME is None and code.residual_BD is not None:
            return x_BD - code.residual_BD
        return self.decode(code, x_BD)

    def forward(self, x_BD: Float[Tensor, "batch input"]) -> Float[Tensor, "batch out"]:
        return self.predict(self.encode(x_BD), x_BD)

    def predict_error(
        self, x_BD: Float[Tensor, "batch input"], dead_M: Bool[Tensor, " latents"]
    ) -> tuple[Float[Tensor, "batch out"], float] | None:
        """`mptrain.topk.predict_error` with this topk coder's parameters."""
        return predict_error(x_BD, self.b_D, *self._encoder(), self.decoder_ME, dead_M)

    @torch.no_grad()
    def initialise_(
        self,
        input_mean_D: Float[Tensor, " input"],
        target_mean_E: Float[Tensor, " out"],
        generator: torch.Generator,
    ) -> None:
        """Set every parameter to its start. An SAE takes its one bias from the input's mean.

        Directions are drawn on the generator's device, so that a CPU generator gives the same coder
        everywhere.
        """
        for parameter in self.parameters():
            parameter.zero_()
        self.b_D.copy_(input_mean_D)
        if self.c_E is not None:
            self.c_E.copy_(target_mean_E)
        directions_MD = torch.randn(
            self.latents, len(self.b_D), generator=generator, device=generator.device
        )
        first_MD = self.encoder_MD if self.W_MD is None else self.W_MD
        assert first_MD is not None
        first_MD.copy_(directions_MD / directions_MD.norm(dim=1, keepdim=True))
        if self.V_ME is not None and self.config.kind == "sae":
            self.V_ME.copy_(first_MD)

    @torch.no_grad()
    def normalise_(self) -> None:
        """Bring the rows of `unit_norm` back to unit norm, within float32 rounding."""
        for name in self.unit_norm:
            rows = self.get_parameter(name)
            rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))

    @torch.no_grad()
    def project_gradient_(self) -> None:
        """Remove from the gradient of each unit-norm row its component along the row."""
        for name in self.unit_norm:
            rows = self.get_parameter(name)
            assert rows.grad is not None
            along_M1 = torch.linalg.vecdot(rows.grad, rows)[:, None]
            rows.grad.addcmul_(rows, along_M1, value=-1)

    def _encoder(self) -> tuple[Tensor, Tensor]:
        assert self.encoder_MD is not None
        assert self.encoder_bias_M is not None
        return self.encoder_MD, self.encoder_bias_M

    def checked_k(self, k: int) -> int:
        """`k`, where this coder can be run with it; else ValueError."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if k > self.latents:
            raise ValueError(
                f"k must be at most the number of latents, got k={k}, latents={self.latents} "
                f"(expansion {self.config.expansion}); use a smaller k or a larger expansion"
            )
        return k


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))
