"""Encoders: each module holds one, as the class that its `ENCODER` names."""

import importlib

from mptrain.coders.encoders.base import Encoder
from mptrain.config.coder import CoderConfig


def make_encoder(config: CoderConfig, input_width: int) -> Encoder:
    """The encoder of an architecture, all zeros: of the module that the table names."""
    module = importlib.import_module(f"{__name__}.{config.architecture.encoder}")
    encoder: Encoder = module.ENCODER(config, input_width)
    return encoder
