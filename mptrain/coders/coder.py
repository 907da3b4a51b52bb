"""A coder: its parameters, its codes and its predictions.

B rows in a batch, D input width, E target width, M latents, K code entries a row. Dictionaries
have a row for each latent, or one for each latent of a block where all blocks share them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mpcache.errors import UsageError
from mptrain.coders.auxk import error_by_encoder, error_by_residual
from mptrain.coders.topk import topk_encode
from mptrain.config.coder import BeginAs, CoderConfig, Codes, k_error
from mptrain.kernels.sparse import dictionary_row, sparse_decode, strongest
from mptrain.kernels.unit_norm import normalise_rows_, project_rows_
from mptrain.pursuit.autograd import pursue
from mptrain.pursuit.backend import Search
from mptrain.pursuit.batch_threshold import Cut
from mptrain.pursuit.refit import pursue_refit
from mptrain.pursuit.rule import Rule

# what a coder may have been trained with that other codes of it do without
_NOT_FOR_REFIT = (
    "detach", "per_step_loss", "multi_topk", "begin_as", "begin_share",
    "backend", "score_dtype", "shortlist_size", "shortlist_refresh",
)  # fmt: skip


class Code(NamedTuple):
    """Codes of a batch. Entries of one row that name the same latent add."""

    idx_BK: Tensor
    "int64 latents, in the order of the pursuit for mp; -1: unused"
    val_BK: Tensor
    "values: 0 where unused; positive but for select signed and magnitude, and for omp"
    residual_BD: Tensor | None
    "what the pursuit left of the input (mp only)"

    def detached(self) -> "Code":
        """The entries alone, without gradients: what may be kept of many rows."""
        return Code(self.idx_BK, self.val_BK.detach(), None)


class Coder(nn.Module):
    """An SAE or transcoder with the parameters of its kind and architecture.

    | parameter | who has it | start (`initialise_`) |
    |---|---|---|
    | `b_D` input bias | all (0 and not trained without `bias`) | mean input |
    | `c_E` output bias | transcoders; an SAE's is `b_D` | mean target |
    | `W_MD` selecting dictionary, unit norm | mp, batch-mp | Gaussian directions |
    | `U_MD` subtracting dictionary, unit norm | mp, subtract separate | `W_MD` |
    | `encoder_MD`, `encoder_bias_M` | the others | Gaussian directions, 0 |
    | `V_ME` predicting dictionary, unit norm | SAEs of the others; mp, subtract predicting |
      the encoder; `W_MD` |
    | `V_ME`, free norm | other transcoders | 0 |
    | `threshold`, not trained but computed (`thresholds.py`) | batch- | 0: no entry is dropped |
    | `S_ED` linear skip (Paulo et al. 2025, arXiv 2501.18823) | skip-transcoder | 0 |

    An mp SAE predicts with `W_MD`, but where it subtracts what predicts. With `free_norm`, no
    dictionary of a pursuit is kept at unit norm. A new coder holds zeros: call `initialise_`, or
    load its state.
    """

    def __init__(self, config: CoderConfig, input_width: int, target_width: int) -> None:
        super().__init__()
        D, E, M = input_width, target_width, config.latents_of(input_width)
        sae, skip = config.kind == "sae", config.kind == "skip-transcoder"
        mp = config.architecture.is_pursuit
        if sae and D != E:
            raise UsageError(
                f"an sae codes rows of one width, got input_width={D}, target_width={E}; "
                "use a transcoder"
            )
        predicts_apart = config.subtract == "predicting"
        if predicts_apart and D != E:
            raise UsageError(
                "subtract predicting needs input and target of one width, got "
                f"input_width={D}, target_width={E}; use subtract selecting"
            )
        self.config = config
        self.latents = M
        self.checked_k(config.k)
        self.coded_as: BeginAs = "mp"
        "how an mp coder codes at present: its training sets it, and ends with mp"
        block = M if config.blocks == "none" else M // config.k
        selecting = block if config.blocks == "predicting" else M
        predicting = block if config.blocks == "selecting" else M
        self.b_D = _zeros(D, trained=config.bias)
        self.c_E = None if sae else _zeros(E, trained=config.bias)
        self.W_MD = _zeros(selecting, D) if mp else None
        self.U_MD = _zeros(selecting, D) if config.subtract == "separate" else None
        self.encoder_MD = None if mp else _zeros(M, D)
        self.encoder_bias_M = None if mp else _zeros(M)
        self.V_ME = None if sae and mp and not predicts_apart else _zeros(predicting, E)
        self.S_ED = _zeros(E, D) if skip else None
        self.threshold: Tensor | None
        self.register_buffer(
            "threshold", torch.zeros(()) if config.architecture.has_threshold else None
        )

    @property
    def unit_norm(self) -> tuple[str, ...]:
        """Names of the parameters whose rows are kept at unit norm."""
        if self.W_MD is None:
            return ("V_ME",) if self.config.kind == "sae" else ()
        apart = {"selecting": (), "separate": ("U_MD",), "predicting": ("V_ME",)}
        return () if self.config.free_norm else ("W_MD", *apart[self.config.subtract])

    @property
    def decoder_ME(self) -> Tensor:
        """What each latent adds to the prediction."""
        decoder = self.W_MD if self.V_ME is None else self.V_ME
        assert decoder is not None
        return decoder

    @property
    def output_bias_E(self) -> Tensor:
        return self.b_D if self.c_E is None else self.c_E

    def encode(
        self,
        x_BD: Float[Tensor, "batch input"],
        k: int | None = None,
        *,
        codes: Codes | None = None,
        over_batch: bool = False,
    ) -> Code:
        """Codes with `k` entries a row and values by `codes` (None: as trained).

        batch-mp has up to `2 k` entries a row, batch-topk up to `4 k`, those above `threshold`;
        with `over_batch`, or a `k` that is not their own, the strongest of all these rows instead,
        `k` a row on average; `thresholds.at_k` makes a coder that has a threshold for another `k`.

        Raises ValueError where this coder cannot be run with such a `k` or such codes.
        """
        over_batch = over_batch or k not in (None, self.config.k)
        k = self.config.k if k is None else self.checked_k(k)
        codes = self.config.codes if codes is None else self.checked_codes(codes)
        if self.W_MD is None or self.coded_as != "mp":
            return Code(*self._encode_linearly(x_BD, k, over_batch), residual_BD=None)
        return Code(*self._pursue(x_BD - self.b_D, k, codes, over_batch))

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
        if self.config.kind == "sae" and code.residual_BD is not None:
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
        decoder_ME, score_dtype = self.decoder_ME, self.config.score_dtype
        if code.residual_BD is None:
            encoder = self._encoder()
            return error_by_encoder(x_BD, self.b_D, *encoder, decoder_ME, dead_M, score_dtype)
        residual_BD, own = code.residual_BD.detach(), self._dictionaries()
        return error_by_residual(residual_BD, *own, decoder_ME, dead_M, score_dtype)

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
        if self.config.bias:
            self.b_D.copy_(input_mean_D)
            if self.c_E is not None:
                self.c_E.copy_(target_mean_E)
        first_MD = self.encoder_MD if self.W_MD is None else self.W_MD
        assert first_MD is not None
        alike = self.config.kind == "sae" or self.config.subtract == "predicting"
        second_MD = self.V_ME if alike else self.U_MD
        # where one of the two is shared by all blocks, the other's blocks start as it
        rows = len(first_MD) if second_MD is None else min(len(first_MD), len(second_MD))
        directions_MD = torch.randn(
            rows, len(self.b_D), generator=generator, device=generator.device
        )
        directions_MD /= directions_MD.norm(dim=1, keepdim=True)
        for dictionary_MD in (first_MD, second_MD):
            if dictionary_MD is not None:
                latents_M = torch.arange(len(dictionary_MD), device=generator.device)
                dictionary_MD.copy_(directions_MD[dictionary_row(latents_M, directions_MD)])

    @torch.no_grad()
    def normalise_(self) -> None:
        """Bring the rows of `unit_norm` back to unit norm, but for rounding."""
        for name in self.unit_norm:
            normalise_rows_(self.get_parameter(name))

    @torch.no_grad()
    def project_gradient_(self) -> None:
        """Remove from the gradient of each unit-norm row its component along the row."""
        for name in self.unit_norm:
            rows = self.get_parameter(name)
            if rows.grad is not None:  # an mp coder that begins as another does not use all yet
                project_rows_(rows.grad, rows)

    def _pursue(
        self, x_BD: Tensor, k: int, codes: Codes, over_batch: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        W_MD, U_MD = self._dictionaries()
        cut = None
        if self.threshold is not None:
            k, cut = 2 * k, Cut(k if over_batch else None, self.threshold)
        if codes == "mp":
            return pursue(x_BD, W_MD, U_MD, k, self.rule, self.search, config.detach, cut)
        return pursue_refit(x_BD, W_MD, k, self.rule, codes)

    def _dictionaries(self) -> tuple[Tensor, Tensor]:
        """Selecting and subtracting rows; one tensor where they are the same."""
        W_MD = self.W_MD
        assert W_MD is not None
        of = {"selecting": W_MD, "separate": self.U_MD, "predicting": self.V_ME}
        U_MD = of[self.config.subtract]
        assert U_MD is not None
        return W_MD, U_MD

    def _encode_linearly(self, x_BD: Tensor, k: int, over_batch: bool) -> tuple[Tensor, Tensor]:
        score_dtype = self.config.score_dtype
        if self.threshold is None:
            grouped = "groupmax" in (self.config.arch, self.coded_as)
            return topk_encode(x_BD, self.b_D, *self._encoder(), k, grouped, score_dtype)
        most = min(4 * k, self.latents)
        idx_BK, val_BK = topk_encode(
            x_BD, self.b_D, *self._encoder(), most, score_dtype=score_dtype
        )
        threshold = strongest(val_BK.detach(), k) if over_batch else self.threshold
        dropped_BK = val_BK < threshold
        return idx_BK.masked_fill(dropped_BK, -1), val_BK.masked_fill(dropped_BK, 0)

    def _encoder(self) -> tuple[Tensor, Tensor]:
        """Rows and biases of a linear encoder; an mp coder begins with its selecting rows."""
        if self.encoder_MD is None:
            assert self.W_MD is not None
            return self.W_MD, self.W_MD.new_zeros(len(self.W_MD))
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

    @property
    def rule(self) -> Rule:
        """What an mp coder's steps choose."""
        config = self.config
        block = None if config.blocks == "none" else self.latents // config.k
        return Rule(config.select, config.tolerance, block)

    def checked_k(self, k: int) -> int:
        """`k`, where this coder can be run with it; else ValueError."""
        if fault := k_error(self.config, k, self.latents):
            raise UsageError(fault)
        return k

    def checked_codes(self, codes: Codes) -> Codes:
        """`codes`, where this coder can be run with them; else ValueError."""
        if codes != self.config.codes:
            if self.W_MD is None:
                raise UsageError(
                    f"codes {codes} are for mp coders, got arch {self.config.arch}; "
                    "leave --codes out"
                )
            training_only = {name: getattr(CoderConfig, name) for name in _NOT_FOR_REFIT}
            replace(self.config, codes=codes, **training_only)
        return codes


def coder_of(config: CoderConfig, tensors: Mapping[str, Tensor]) -> Coder:
    """A coder that holds these tensors themselves, not copies of them."""
    target_width = len(tensors.get("c_E", tensors["b_D"]))
    with torch.device("meta"):  # no memory for the zeros of a new coder
        coder = Coder(config, len(tensors["b_D"]), target_width)
    coder.load_state_dict(tensors, assign=True)
    return coder


def _zeros(*shape: int, trained: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape), requires_grad=trained)
