"""A coder: its parameters, its codes and its predictions.

B rows in a batch, D input width, E target width, M latents, K code entries a row.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mptrain.auxk import error_by_encoder, error_by_residual
from mptrain.config import PURSUITS, CoderConfig
from mptrain.pursuit.cut import Cut
from mptrain.pursuit.pursue import pursue
from mptrain.pursuit.refit import pursue_refit
from mptrain.pursuit.search import Search
from mptrain.sparse import sparse_decode, strongest
from mptrain.topk import topk_encode

_FOLLOW = 0.01  # share of a batch in the running threshold


class Code(NamedTuple):
    """Codes of a batch. Entries of one row that name the same latent add."""

    idx_BK: Tensor
    "int64 latents, in the order of the pursuit for mp; -1: unused"
    val_BK: Tensor
    "values, positive where used (omp: not 0) and 0 where not"
    residual_BD: Tensor | None
    "what the pursuit left of the input (mp only)"


class Coder(nn.Module):
    """An SAE or transcoder with the parameters of its kind and architecture.

    | parameter | who has it | start (`initialise_`) |
    |---|---|---|
    | `b_D` input bias | all | mean input |
    | `c_E` output bias | transcoders; an SAE's is `b_D` | mean target |
    | `W_MD` dictionary, unit norm | mp, batch-mp | Gaussian directions |
    | `encoder_MD`, `encoder_bias_M` | the others | Gaussian directions, 0 |
    | `V_ME` decoder, unit norm | their SAE; an mp SAE's is `W_MD` | the encoder |
    | `V_ME` decoder, free norm | transcoders | 0 |
    | `threshold`, not trained but followed | batch- | 0: no entry is dropped |
    | `S_ED` linear skip (Paulo et al. 2025, arXiv 2501.18823) | skip-transcoder | 0 |

    A new coder holds zeros: call `initialise_`, or load its state.
    """

    def __init__(self, config: CoderConfig, input_width: int, target_width: int) -> None:
        super().__init__()
        D, E, M = input_width, target_width, config.expansion * input_width
        sae, skip = config.kind == "sae", config.kind == "skip-transcoder"
        mp, batch = config.arch in PURSUITS, config.arch.startswith("batch-")
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
        self.threshold: Tensor | None
        self.register_buffer("threshold", torch.zeros(()) if batch else None)

    @property
    def unit_norm(self) -> tuple[str, ...]:
        """Names of the parameters whose rows are kept at unit norm."""
        if self.W_MD is not None:
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

    def encode(
        self, x_BD: Float[Tensor, "batch input"], k: int | None = None, *, over_batch: bool = False
    ) -> Code:
        """Codes with `k` entries a row (None: as trained). Raises ValueError unless 0 < k <= M.

        batch-mp has up to `2 k` entries a row, batch-topk up to `4 k`, those above `threshold`;
        with `over_batch`, or a `k` that is not their own, the strongest of all these rows instead,
        `k` a row on average.
        """
        over_batch = over_batch or k not in (None, self.config.k)
        k = self.config.k if k is None else self.checked_k(k)
        if self.W_MD is not None:
            return Code(*self._pursue(x_BD - self.b_D, self.W_MD, k, over_batch))
        return Code(*self._encode_linearly(x_BD, k, over_batch), residual_BD=None)

    def decode(self, code: Code, x_BD: Float[Tensor, "batch input"]) -> Float[Tensor, "batch out"]:
        """`c + sum_k val_k v_k (+ S x)`; without a skip `x` does not matter."""
        return sparse_decode(code.idx_BK, code.val_BK, self.decoder_ME) + self.decode_nothing(x_BD)

    def decode_nothing(self, x_BD: Float[Tensor, "batch input"]) -> Tensor:
        """`c (+ S x)`, what is predicted without a code: `[E]`, or `[B, E]` with a skip."""
        if self.S_ED is None:
            return self.output_bias_E
        return self.output_bias_E + x_BD.to(self.S_ED.dtype) @ self.S_ED.T

    def predict(self, code: Code, x_BD: Float[Tensor, "batch input"]) -> Float[Tensor, "batch out"]:
        """`decode` of a code that `encode` made of `x`; for an mp SAE the free `x - residual`."""
        if self.V_ME is None and code.residual_BD is not None:
            return x_BD - code.residual_BD
        return self.decode(code, x_BD)

    def forward(self, x_BD: Float[Tensor, "batch input"]) -> Float[Tensor, "batch out"]:
        return self.predict(self.encode(x_BD), x_BD)

    def predict_error(
        self,
        code: Code,
        x_BD: Float[Tensor, "batch input"],
        dead_M: Bool[Tensor, " latents"],
    ) -> tuple[Float[Tensor, "batch out"], float] | None:
        """What the dead latents alone make of the error of `predict`, and the loss' scale.

        None where nothing is dead. The code's residual is taken as given.
        """
        if self.W_MD is not None:
            assert code.residual_BD is not None
            residual_BD = code.residual_BD.detach()
            return error_by_residual(residual_BD, self.W_MD, self.decoder_ME, dead_M)
        return error_by_encoder(x_BD, self.b_D, *self._encoder(), self.decoder_ME, dead_M)

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
    def follow_threshold_(self, code: Code) -> None:
        """Move the threshold of batch- towards what was the smallest value kept in a batch."""
        if self.threshold is None:
            return
        smallest = code.val_BK.masked_fill(code.val_BK <= 0, torch.inf).min()
        followed = torch.where(self.threshold > 0, self.threshold.lerp(smallest, _FOLLOW), smallest)
        self.threshold.copy_(torch.where(smallest.isfinite(), followed, self.threshold))

    @torch.no_grad()
    def project_gradient_(self) -> None:
        """Remove from the gradient of each unit-norm row its component along the row."""
        for name in self.unit_norm:
            rows = self.get_parameter(name)
            assert rows.grad is not None
            along_M1 = torch.linalg.vecdot(rows.grad, rows)[:, None]
            rows.grad.addcmul_(rows, along_M1, value=-1)

    def _pursue(
        self, x_BD: Tensor, W_MD: Tensor, k: int, over_batch: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        if config.codes != "mp":
            return pursue_refit(x_BD, W_MD, k, config.tolerance, config.codes)
        cut = None
        if self.threshold is not None:
            k, cut = 2 * k, Cut(k if over_batch else None, self.threshold)
        return pursue(x_BD, W_MD, k, config.tolerance, self.search, config.detach, cut)

    def _encode_linearly(self, x_BD: Tensor, k: int, over_batch: bool) -> tuple[Tensor, Tensor]:
        if self.threshold is None:
            grouped = self.config.arch == "groupmax"
            return topk_encode(x_BD, self.b_D, *self._encoder(), k, grouped)
        most = min(4 * k, self.latents)
        idx_BK, val_BK = topk_encode(x_BD, self.b_D, *self._encoder(), most)
        threshold = strongest(val_BK.detach(), k) if over_batch else self.threshold
        dropped_BK = val_BK < threshold
        return idx_BK.masked_fill(dropped_BK, -1), val_BK.masked_fill(dropped_BK, 0)

    def _encoder(self) -> tuple[Tensor, Tensor]:
        assert self.encoder_MD is not None
        assert self.encoder_bias_M is not None
        return self.encoder_MD, self.encoder_bias_M

    @property
    def search(self) -> Search:
        """How an mp coder finds its atoms."""
        config = self.config
        return Search(
            backend=config.backend,
            shortlist_size=config.shortlist_size,
            shortlist_refresh=config.shortlist_refresh,
            score_dtype=config.score_dtype,
        )

    def checked_k(self, k: int) -> int:
        """`k`, where this coder can be run with it; else ValueError."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if k > self.latents:
            raise ValueError(
                f"k must be at most the number of latents, got k={k}, latents={self.latents} "
                f"(expansion {self.config.expansion}); use a smaller k or a larger expansion"
            )
        if self.config.arch == "groupmax" and self.latents % k:
            raise ValueError(
                f"k must divide the number of latents for groupmax, got k={k}, "
                f"latents={self.latents}"
            )
        return k


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))
