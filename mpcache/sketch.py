"""What can be known of a model without loading its weights: its files, its modules' names."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from mpcache.config import CollectConfig
from mpcache.hub import explained
from mpcache.model import check_architecture, model_source
from mpcache.tokenised import Tokenizer, Vocabulary, vocabulary_of


def load_architecture(config: CollectConfig) -> PreTrainedConfig:
    """Raises ValueError where the user can help it, ConnectionError where the Hub is not there."""
    with explained(f"model {config.model}", config.revision):
        architecture: PreTrainedConfig = AutoConfig.from_pretrained(
            model_source(config),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    check_architecture(architecture, config)
    return architecture


def load_vocabulary(config: CollectConfig, tokenizer: Tokenizer) -> Vocabulary:
    """The token ids that the model can read, by its config."""
    size = getattr(load_architecture(config).get_text_config(), "vocab_size", None)
    return vocabulary_of(tokenizer, size if isinstance(size, int) else None)


def files_digest(config: CollectConfig) -> str | None:
    """What names a model's files: their sha256, or the commit of a Hub model.

    Files alike compute alike with the same libraries. None where code that comes with the model
    may compute anything else.
    """
    if config.trust_remote_code:
        return None
    folder = Path(config.model).expanduser()
    if not folder.is_dir():
        commit = getattr(load_architecture(config), "_commit_hash", None)
        return None if commit is None else f"commit {commit}"
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.is_file()):
        with file.open("rb") as opened:
            digest.update(
                f"{file.name}\0{hashlib.file_digest(opened, 'sha256').hexdigest()}\0".encode()
            )
    return f"sha256 {digest.hexdigest()}"


def skeleton(config: CollectConfig) -> PreTrainedModel:
    """The base model without weights, on the meta device: its modules have their names."""
    architecture = load_architecture(config)
    with explained(f"model {config.model}", config.revision), torch.device("meta"):
        loader: Any = AutoModel  # hidden by a decorator
        model: PreTrainedModel = loader.from_config(
            architecture,
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
        )
    return model
