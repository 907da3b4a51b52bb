"""A coder: an encoder, perhaps a threshold, a decoder, and the biases between them.

B rows in a batch, D input width, E target width, M latents, K code entries a row.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mpcache.errors import UsageError
from mptrain.coders.batch_threshold import BatchThreshold
from mptrain.coders.code import Code
from mptrain.coders.decoder import Decoder
from mptrain.coders.encoders import make_encoder
from mptrain.coders.encoders.base import zeros
from mptrain.config.coder import CoderConfig, k_error
from mptrain.config.coder_settings import Codes
from mptrain.kernels.sparse import dictionary_row
from mptrain.kernels.unit_norm import normalise_rows_, project_rows_

# options that a coder may have been trained with, and that refitted codes of it do without
_NOT_FOR_REFIT = (
    "detach", "per_step_loss", "multi_topk", "begin_as", "begin_share",
    "backend", "score_dtype", "shortlist_size", "shortlist_refresh",
)  # fmt: skip


class Coder(nn.Module):
    """A sparse autoencoder or transcoder: `y_hat = decoder(encoder(x - b)) + c`.

    The input bias `b_D` starts at the mean input, the output bias `c_E` of a transcoder at the mean
    target; an SAE has one bias for both. Without `bias` they stay 0. A new coder holds zeros: call
    `initialise_`, or load it with `load_coder`.

    Example:
        >>> import torch
        >>> from mptrain import Coder, CoderConfig
        >>> side = ("layers.1:output",)
        >>> config = CoderConfig(inputs=side, targets=side, kind="sae", arch="mp", k=2, expansion=4)
        >>> coder = Coder(config, input_width=8, target_width=8)
        >>> coder.initialise_(torch.zeros(8), torch.zeros(8), torch.Generator().manual_seed(0))
        >>> x_BD = torch.ones(3, 8)
        >>> code = coder.encode(x_BD)
        >>> code.idx_BK.shape, coder.predict(code, x_BD).shape
        (torch.Size([3, 2]), torch.Size([3, 8]))
    """

    def __init__(self, config: CoderConfig, input_width: int, target_width: int) -> None:
        """Raises UsageError where the config does not fit the widths, in dimensions."""
        super().__init__()
        _check_widths(config, input_width, target_width)
        self.config = config
        self.latents = config.latents_of(input_width)
        if config.k is not None:
            check_k(self, config.k)
        self.b_D = zeros(input_width, trained=config.bias)
        self.c_E = None if config.kind == "sae" else zeros(target_width, trained=config.bias)
        self.encoder = make_encoder(config, input_width)
        self.decoder = Decoder(config, input_width, target_width)
        architecture = config.architecture
        self.batch_threshold = (
            BatchThreshold(architecture.entries) if architecture.has_threshold else None
        )

    @property
    def unit_norm(self) -> tuple[str, ...]:
        """Names of the parameters whose rows are kept at unit norm."""
        encoder = (f"encoder.{name}" for name in self.encoder.unit_norm)
        return (*encoder, *(f"decoder.{name}" for name in self.decoder.unit_norm))

    @property
    def decoder_ME(self) -> Tensor:
        """What each latent adds to the prediction: `[M, E]`, or a block that all blocks share."""
        return self.decoder.rows(self.encoder.dictionary_MD)

    @property
    def k(self) -> int:
        """Latents of a row: K, or as many as there are where the architecture has no K."""
        return self.latents if self.config.k is None else self.config.k

    @property
    def output_bias_E(self) -> Tensor:
        """`[E]`; an SAE's is its input bias."""
        return self.b_D if self.c_E is None else self.c_E

    def encode(
        self,
        x_BD: Float[Tensor, "batch input"],
        k: int | None = None,
        *,
        codes: Codes | None = None,
        over_batch: bool = False,
    ) -> Code:
        """Code rows with `k` entries each and values by `codes` (None: as trained).

        batch-mp has up to `2 k` entries a row, batch-topk up to `4 k`: those above its threshold;
        with `over_batch`, or another `k` than its own, the strongest of all these rows, `k` a row
        on average. `thresholds.coder_at_k` makes a coder that has a threshold for another `k`.

        Raises:
            UsageError: this coder cannot be run with such a `k` or such codes.
        """
        over_batch = over_batch or k not in (None, self.config.k)
        k = self.k if k is None else check_k(self, k)
        codes = self.config.codes if codes is None else check_codes(self, codes)
        threshold = None
        if self.batch_threshold is not None:
            k, threshold = self.batch_threshold.widen(k, over_batch)
        return self.encoder.encode(x_BD, self.b_D, self.decoder_ME, k, codes, threshold)

    def decode(self, code: Code, x_BD: Float[Tensor, "batch input"]) -> Float[Tensor, "batch out"]:
        """`c + sum_k val_k v_k (+ S x)`; without a skip `x` does not matter."""
        return self.decoder.decode(code, self.decoder_ME, self.output_bias_E, x_BD)

    def decode_offset(self, x_BD: Float[Tensor, "batch input"]) -> Tensor:
        """`c (+ S x)`, what is predicted without any latent: `[E]`, or `[B, E]` with a skip."""
        return self.decoder.offset(self.output_bias_E, x_BD)

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
        """`Encoder.predict_error` of this coder."""
        return self.encoder.predict_error(code, x_BD, self.b_D, self.decoder_ME, dead_M)

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
        self.encoder.initialise_()
        dictionaries = self.encoder.dictionaries()
        if self.decoder.starts_as_encoder:
            dictionaries.append(self.decoder_ME)
        _set_directions_(dictionaries, generator)

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


def check_k(coder: Coder, k: int) -> int:
    """Return `k`; raise UsageError where the coder cannot be run with it."""
    if error := k_error(coder.config, k, coder.latents):
        raise UsageError(error)
    return k


def check_codes(coder: Coder, codes: Codes) -> Codes:
    """Return `codes`; raise UsageError where the coder cannot be run with them."""
    config = coder.config
    if codes != config.codes:
        if not config.architecture.is_pursuit:
            raise UsageError(
                f"codes={codes} applies only to arch=mp, got a coder with arch={config.arch}; "
                "remove --codes"
            )
        training_only = {name: getattr(CoderConfig, name) for name in _NOT_FOR_REFIT}
        replace(config, codes=codes, **training_only)
    return codes


def coder_from_tensors(config: CoderConfig, tensors: Mapping[str, Tensor]) -> Coder:
    """A coder that holds these tensors themselves, not copies of them."""
    target_width = len(tensors.get("c_E", tensors["b_D"]))
    with torch.device("meta"):  # no memory for the zeros of a new coder
        coder = Coder(config, len(tensors["b_D"]), target_width)
    coder.load_state_dict(tensors, assign=True)
    return coder


def _set_directions_(dictionaries: list[Tensor], generator: torch.Generator) -> None:
    """Start all dictionaries as the same random unit-norm rows.

    Where blocks share the rows of one dictionary, all blocks of the other start as these.
    """
    rows, width = min(map(len, dictionaries)), dictionaries[0].shape[1]
    directions_MD = torch.randn(rows, width, generator=generator, device=generator.device)
    directions_MD /= directions_MD.norm(dim=1, keepdim=True)
    for dictionary_MD in dictionaries:
        latents_M = torch.arange(len(dictionary_MD), device=generator.device)
        dictionary_MD.copy_(directions_MD[dictionary_row(latents_M, directions_MD)])


def _check_widths(config: CoderConfig, input_width: int, target_width: int) -> None:
    if input_width == target_width:
        return
    widths = f"input_width={input_width}, target_width={target_width}"
    if config.kind == "sae":
        raise UsageError(
            f"kind=sae needs input and target of the same width, got {widths}; use kind=transcoder"
        )
    if config.subtract == "predicting":
        raise UsageError(
            "subtract=predicting needs input and target of the same width, got "
            f"{widths}; use subtract=selecting"
        )
