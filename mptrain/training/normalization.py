"""Scale rows to the size that learning rates are made for, and coders back to unscaled rows.

B rows in a batch, D input width, E target width.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from mptrain.config.coder import CoderConfig


class Scale(NamedTuple):
    """Factors by which rows are multiplied in training."""

    input: float
    target: float

    def applied(
        self, x_BD: Float[Tensor, "batch input"], y_BE: Float[Tensor, "batch target"]
    ) -> tuple[Tensor, Tensor]:
        return _times(x_BD, self.input), _times(y_BE, self.target)


IDENTITY = Scale(1.0, 1.0)
TARGET_DEVIATION = 2.0
(
    "standard deviation of the scaled targets of a transcoder; its encoder wants twice the rate of "
    "its decoder, relative to the scales of input and target (docs/learning-rates.md)"
)


def scale_of(config: CoderConfig, input_variance: float, target_variance: float) -> Scale:
    """Return the factors of `normalise`, from the mean variance of a dimension of input and target.

    Scaled inputs have a mean variance of 1, scaled targets of a transcoder one of
    `TARGET_DEVIATION ** 2`. Where one dictionary both subtracts from the input and predicts the
    target, both have the factor of the input.
    """
    if not config.normalise:
        return IDENTITY
    source = _factor(input_variance)
    if config.kind == "sae" or config.subtract == "predicting":
        return Scale(source, source)
    return Scale(source, TARGET_DEVIATION * _factor(target_variance))


def for_unscaled_rows(tensors: Mapping[str, Tensor], scale: Scale) -> dict[str, Tensor]:
    """Return the tensors of a coder for unscaled rows, from those of a coder for scaled rows.

    Values of a code are divided by the factor of the input, predictions by that of the target.
    """
    factors = {
        "b_D": 1 / scale.input,
        "bias_M": 1 / scale.input,
        "gate_bias_M": 1 / scale.input,
        "threshold_M": 1 / scale.input,
        "threshold": 1 / scale.input,
        "c_E": 1 / scale.target,
        "V_ME": scale.input / scale.target,
        "S_ED": scale.input / scale.target,
    }
    return {
        name: _times(tensor, factors.get(name.rpartition(".")[2], 1.0))
        for name, tensor in tensors.items()
    }


def _factor(variance: float) -> float:
    return 1.0 if variance == 0 else 1 / math.sqrt(variance)


def _times(tensor: Tensor, factor: float) -> Tensor:
    """Return the product; the tensor itself for a factor of 1."""
    return tensor if factor == 1 else tensor * factor
