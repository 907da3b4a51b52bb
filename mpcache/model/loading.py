"""MODEL -> the base model and its tokenizer."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mpcache.config import CollectConfig
from mpcache.data.vocabulary import ConfigTokens, Tokenizer
from mpcache.errors import UsageError, first_line
from mpcache.model.checkpoint_validation import (
    check_loaded,
    check_model_files,
    check_no_mismatched_shapes,
    check_settings,
    check_tokenizer_files,
    check_vocabulary,
    has_tokenizer,
)
from mpcache.model.gguf import dequantize_options, forget_quantization_
from mpcache.model.glibc_malloc import keep_freed_memory
from mpcache.model.load_errors import explain_load_errors
from mpcache.model.model_config import check_positions, prepare_remote_code, read_architecture
from mpcache.model.model_source import ModelSource, find_source
from mpcache.model.position_table import usable_positions

Head = Literal["causal", "masked"]


def available_device(name: str) -> torch.device:
    """The torch device of this name, which must work here; auto: the first GPU, or the CPU."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise UsageError(
            f"device must be a torch device of this machine, got {name} ({first_line(error)}); "
            "use --device auto"
        ) from error
    return torch.device(name)


def load_tokenizer(config: CollectConfig, source: ModelSource | None = None) -> Tokenizer:
    """The model's tokenizer, or the token ids in its config if it has no tokenizer.

    `source` is the location of the model's files, if the caller knows it.

    Raises UsageError for a damaged or slow tokenizer, ConnectionError without the Hub.
    """
    source = source or find_source(config)
    check_settings(source)
    if not has_tokenizer(source):
        return _config_tokens(source, config)
    check_tokenizer_files(source)
    return _load_fast_tokenizer(source, config)


def _load_fast_tokenizer(source: ModelSource, config: CollectConfig) -> PreTrainedTokenizerBase:
    prepare_remote_code(config)
    with explain_load_errors(source, "tokenizer of", config):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.location, trust_remote_code=config.trust_remote_code, **source.options
        )
    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer must be a fast tokenizer, got {type(tokenizer).__name__} in "
            f"{config.model}; convert it to tokenizer.json"
        )
    return tokenizer


def _config_tokens(source: ModelSource, config: CollectConfig) -> ConfigTokens:
    """The token ids that the model's config names."""
    text = read_architecture(source, config).get_text_config()
    if not isinstance(size := getattr(text, "vocab_size", None), int):
        raise UsageError(
            f"the model {config.model} has neither a tokenizer nor a vocab_size in config.json; "
            "add tokenizer.json to the model's folder"
        )
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    return ConfigTokens(size, *(_first_id(getattr(text, name, None), size) for name in names))


def _first_id(value: Any, size: int) -> int | None:
    """A token's id. Some configs list several ids, and some name an id outside the vocabulary."""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) and 0 <= first < size else None


def load_model(
    config: CollectConfig,
    *,
    head: Head | None = None,
    source: ModelSource | None = None,
    tokenizer: Tokenizer | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """The base model, or the language model with this head, and its tokenizer.

    The model is frozen and on its device. `source` and `tokenizer` save loading them again.

    Raises UsageError for files or settings that cannot be used, ConnectionError without the Hub.
    """
    device, source = available_device(config.device), source or find_source(config)
    tensors = check_model_files(source)
    tokenizer = tokenizer or load_tokenizer(config, source)
    if device.type == "cpu":
        keep_freed_memory()
    architecture = read_architecture(source, config)
    model, info = load_weights(source, architecture, config, head)
    if (positions := usable_positions(model)) is not None:
        check_positions(positions, config)
    check_loaded(model, source, info, tensors)
    if not isinstance(tokenizer, ConfigTokens):
        check_vocabulary(model, tokenizer, config)
    model.train(False).requires_grad_(False)
    model.to(device)  # type: ignore[arg-type]  # hidden by a decorator
    if config.autocast:
        lower = torch.autocast(device.type, getattr(torch, config.model_dtype))
        model.forward = lower(model.forward)
    return model, tokenizer


def load_weights(
    source: ModelSource,
    architecture: PreTrainedConfig,
    config: CollectConfig,
    head: Head | None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and the weights that the checkpoint lacks or has in excess."""
    loader = auto_class_for(architecture, head)
    if loader is None:
        raise UsageError(
            f"the architecture {architecture.model_type} has no {head} language-model head; use "
            "another model"
        )

    def load(**options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        model, info = loader.from_pretrained(
            source.location,
            config=architecture,
            trust_remote_code=config.trust_remote_code,
            dtype=torch.float32 if config.autocast else getattr(torch, config.model_dtype),
            attn_implementation=config.attention,
            output_loading_info=True,
            **(dequantize_options() if source.gguf else {}),
            **source.options,
            **options,
        )
        return model, info

    with explain_load_errors(source, "model", config), quiet_load_report():
        try:
            model, info = load()
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            check_no_mismatched_shapes(source, load(ignore_mismatched_sizes=True)[1])
            raise
    if source.gguf:
        forget_quantization_(model)
    keep_in_memory_(model)
    return model, info


def keep_in_memory_(model: PreTrainedModel) -> None:
    """Copy weights that are still mapped to their file, which another program may change."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and not tensor.untyped_storage().resizable():
            tensor.data = tensor.data.clone()  # the storage does not belong to torch


def auto_class_for(architecture: PreTrainedConfig, head: Head | None) -> Any | None:
    """The class of `transformers` that loads a model with this head; None without such a class.

    Models that also read images have a separate class for their causal head.
    """
    loaders: dict[Head | None, tuple[Any, ...]] = {
        None: (AutoModel,),
        "causal": (AutoModelForCausalLM, AutoModelForImageTextToText),
        "masked": (AutoModelForMaskedLM,),
    }
    own_classes = getattr(architecture, "auto_map", None) or {}  # code that comes with the model
    for loader in loaders[head]:
        if head is None or loader.__name__ in own_classes:
            return loader
        if type(architecture) in loader._model_mapping:
            return loader
    return None


@contextmanager
def quiet_load_report() -> Iterator[None]:
    """Within this context `transformers` prints no table of unused weights."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


# --- identity ---
