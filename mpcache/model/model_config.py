"""The architecture of a model, from its config alone: without loading weights."""

from transformers import AutoConfig, PreTrainedConfig

from mpcache.config import CollectConfig
from mpcache.data.vocabulary import Tokenizer, Vocabulary, vocabulary_of
from mpcache.errors import UsageError
from mpcache.model.checkpoint_validation import check_settings
from mpcache.model.fresh_remote_code import use_fresh_copies
from mpcache.model.gguf import check_gguf
from mpcache.model.load_errors import explain_load_errors
from mpcache.model.model_source import ModelSource, find_source


def load_architecture(config: CollectConfig) -> PreTrainedConfig:
    """The checked architecture of the config's model.

    Raises UsageError for files that cannot be used, ConnectionError without the Hub.
    """
    source = find_source(config)
    if source.gguf_path is not None:
        check_gguf(source.gguf_path)
    return read_architecture(source, config)


def read_architecture(source: ModelSource, config: CollectConfig) -> PreTrainedConfig:
    """The checked architecture of a model whose source is known."""
    check_settings(source)
    prepare_remote_code(config)
    with explain_load_errors(source, "model", config):
        architecture: PreTrainedConfig = AutoConfig.from_pretrained(
            source.location, trust_remote_code=config.trust_remote_code, **source.options
        )
    _check_architecture(architecture, config)
    return architecture


def prepare_remote_code(config: CollectConfig) -> None:
    """Run code that comes with the model, if the config allows it, from a fresh copy."""
    if config.trust_remote_code:
        use_fresh_copies()


def _check_architecture(architecture: PreTrainedConfig, config: CollectConfig) -> None:
    if architecture.is_encoder_decoder:
        raise UsageError(
            "a model must be a decoder or an encoder, got the encoder-decoder "
            f"{architecture.model_type}; use another model"
        )
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        check_positions(positions, config)


def check_positions(positions: int, config: CollectConfig) -> None:
    """Raise UsageError where sequences are longer than the model's number of positions."""
    if positions < config.ctx_len:
        raise UsageError(
            f"ctx_len must be at most the model's {positions} positions, got {config.ctx_len}; "
            f"use --ctx-len {positions}"
        )


def load_vocabulary(config: CollectConfig, tokenizer: Tokenizer) -> Vocabulary:
    """The token ids that the model can read, by its architecture."""
    size = getattr(load_architecture(config).get_text_config(), "vocab_size", None)
    return vocabulary_of(tokenizer, size if isinstance(size, int) else None)
