"""A model without weights."""

from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel

from mpcache.config import CollectConfig
from mpcache.model.load_errors import explain_load_errors
from mpcache.model.model_config import load_architecture
from mpcache.model.model_source import find_source


def skeleton(config: CollectConfig) -> PreTrainedModel:
    """The base model on the meta device: modules, names and shapes, without weights."""
    architecture = load_architecture(config)
    with explain_load_errors(find_source(config), "model", config), torch.device("meta"):
        loader: Any = AutoModel  # hidden by a decorator
        model: PreTrainedModel = loader.from_config(
            architecture,
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
        )
    return model
