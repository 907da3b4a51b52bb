"""What can be known of a model without loading its weights: its files, its modules' names."""

from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from mpcache.config import CollectConfig
from mpcache.data.vocabulary import Tokenizer, Vocabulary, vocabulary_of
from mpcache.model.file_snapshot import ModelFiles
from mpcache.model.gguf import check_gguf
from mpcache.model.load_errors import explain_load_errors
from mpcache.model.loading import architecture_of
from mpcache.model.model_source import find_source


def load_architecture(config: CollectConfig) -> PreTrainedConfig:
    """Raises UsageError where the user can help it, ConnectionError where the Hub is not there."""
    source = find_source(config)
    if source.gguf_path is not None:
        check_gguf(source.gguf_path)
    return architecture_of(source, config)


def load_vocabulary(config: CollectConfig, tokenizer: Tokenizer) -> Vocabulary:
    """The token ids that the model can read, by its config."""
    size = getattr(load_architecture(config).get_text_config(), "vocab_size", None)
    return vocabulary_of(tokenizer, size if isinstance(size, int) else None)


def files_digest(config: CollectConfig) -> str | None:
    """What names a model's files now: their sha256, or the commit of a Hub model.

    Files alike compute alike with the same libraries. None where code that comes with the model
    may compute anything else.
    """
    if config.trust_remote_code:
        return None
    source = find_source(config)
    if source.folder is None:  # the commit is enough: what the Hub has there never changes
        return None if source.commit is None else f"commit {source.commit}"
    return ModelFiles.of(source).digest()


def skeleton(config: CollectConfig) -> PreTrainedModel:
    """The base model without weights, on the meta device: its modules have their names."""
    architecture = load_architecture(config)
    with explain_load_errors(find_source(config), "model", config), torch.device("meta"):
        loader: Any = AutoModel  # hidden by a decorator
        model: PreTrainedModel = loader.from_config(
            architecture,
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
        )
    return model
