"""Rows brought to a size that learning rates are made for, and coders brought back from it.

Factors are powers of two: scaling is exact then, and so is a coder that was brought back.

B rows in a batch, D input width, E target width.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from mptrain.config.coder import CoderConfig


class Scale(NamedTuple):
    """What rows are multiplied by before a coder in training sees them."""

    input: float
    target: float

    def applied(
        self, x_BD: Float[Tensor, "batch input"], y_BE: Float[Tensor, "batch target"]
    ) -> tuple[Tensor, Tensor]:
        return _times(x_BD, self.input), _times(y_BE, self.target)


IDENTITY = Scale(1.0, 1.0)


def scale_of(config: CoderConfig, input_square: float, target_square: float) -> Scale:
    """What `normalise` asks for, from the mean squares of a value of input and target.

    These mean squares are between 1/2 and 2 afterwards; the target's is not where one dictionary
    both subtracts from the input and predicts the target: there both have the input's factor.
    """
    if not config.normalise:
        return IDENTITY
    source = _power_of_two(input_square)
    alike = config.subtract == "predicting"
    return Scale(source, source if alike else _power_of_two(target_square))


def for_unscaled_rows(tensors: Mapping[str, Tensor], scale: Scale) -> dict[str, Tensor]:
    """The tensors of a coder for rows as they are, from those of one for scaled rows.

    Values of a code are divided by the input's factor, what they predict by the target's.
    """
    factors = {
        "b_D": 1 / scale.input,
        "bias_M": 1 / scale.input,
        "threshold": 1 / scale.input,
        "c_E": 1 / scale.target,
        "V_ME": scale.input / scale.target,
        "S_ED": scale.input / scale.target,
    }
    return {
        name: _times(tensor, factors.get(name.rpartition(".")[2], 1.0))
        for name, tensor in tensors.items()
    }


def _power_of_two(square: float) -> float:
    return 1.0 if square == 0 else 2.0 ** -round(math.log2(square) / 2)


def _times(tensor: Tensor, factor: float) -> Tensor:
    """The tensor itself where nothing is to be done."""
    return tensor if factor == 1 else tensor * factor
