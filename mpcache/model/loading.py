"""MODEL -> the base model, its tokenizer, and what identifies them."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
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
    check_settings,
    check_tokenizer_files,
    check_vocabulary,
    has_tokenizer,
    refuse_other_shapes,
)
from mpcache.model.gguf import forget_quantization, weights_options
from mpcache.model.load_errors import explain_load_errors
from mpcache.model.malloc import keep_freed_memory
from mpcache.model.model_source import ModelSource, find_source, short_name
from mpcache.model.remote_code import code_digest, use_fresh_copies

# what differs between two copies of the same weights: where they lie, who wrote them, how they run
VOLATILE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
VOLATILE |= {"_model_name_or_path"}  # a title in a .gguf file
Head = Literal["causal", "masked"]
LIBRARIES = ("mpcache", "torch", "transformers", "tokenizers", "datasets", "zarr", "numpy")


def resolve_device(name: str) -> torch.device:
    """`auto` takes the first GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise UsageError(
            f"device must be a torch device here, got {name} ({first_line(error)}); use auto"
        ) from error
    return torch.device(name)


def load_tokenizer(config: CollectConfig, source: ModelSource | None = None) -> Tokenizer:
    """The model's tokenizer, or the token ids that its config names where it has none.

    `source` is where the model's files are, if that is known.

    Raises UsageError where it is damaged or a slow one, ConnectionError without the Hub.
    """
    source = source or find_source(config)
    check_settings(source)
    if not has_tokenizer(source):
        return token_ids(source, config)
    check_tokenizer_files(source)
    return tokenizer_of(source, config)


def tokenizer_of(source: ModelSource, config: CollectConfig) -> PreTrainedTokenizerBase:
    allow_code(config)
    with explain_load_errors(source, "tokenizer of", config):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.location, trust_remote_code=config.trust_remote_code, **source.options
        )
    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer must be a fast one, got {type(tokenizer).__name__} in {config.model}; "
            "convert it to tokenizer.json"
        )
    return tokenizer


def token_ids(source: ModelSource, config: CollectConfig) -> ConfigTokens:
    """What the model's config says of its tokens."""
    text = architecture_of(source, config).get_text_config()
    if not isinstance(size := getattr(text, "vocab_size", None), int):
        raise UsageError(f"the model {config.model} has neither a tokenizer nor a vocab_size")
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    return ConfigTokens(size, *(_first_id(getattr(text, name, None), size) for name in names))


def _first_id(value: Any, size: int) -> int | None:
    """A token's id; some configs list several, and some name one that they do not have."""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) and 0 <= first < size else None


def load_model(
    config: CollectConfig,
    *,
    head: Head | None = None,
    source: ModelSource | None = None,
    tokenizer: Tokenizer | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """The base model, or the language model with this head around it, and its tokenizer.

    The model is on its device and frozen. `source` and `tokenizer` are given where they are known.

    Raises UsageError where the user can help it, ConnectionError where the Hub could not be asked.
    """
    device, source = resolve_device(config.device), source or find_source(config)
    tensors = check_model_files(source)
    tokenizer = tokenizer or load_tokenizer(config, source)
    if device.type == "cpu":
        keep_freed_memory()
    architecture = architecture_of(source, config)
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


def allow_code(config: CollectConfig) -> None:
    if config.trust_remote_code:
        use_fresh_copies()


def architecture_of(source: ModelSource, config: CollectConfig) -> PreTrainedConfig:
    """The model's config, checked."""
    check_settings(source)
    allow_code(config)
    with explain_load_errors(source, "model", config):
        architecture: PreTrainedConfig = AutoConfig.from_pretrained(
            source.location, trust_remote_code=config.trust_remote_code, **source.options
        )
    check_architecture(architecture, config)
    return architecture


def check_architecture(architecture: PreTrainedConfig, config: CollectConfig) -> None:
    if architecture.is_encoder_decoder:
        raise UsageError(
            f"a model must be a decoder or an encoder, got the encoder-decoder "
            f"{architecture.model_type}; use another"
        )
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        check_positions(positions, config)


def check_positions(positions: int, config: CollectConfig) -> None:
    if positions < config.ctx_len:
        raise UsageError(
            f"ctx_len must not exceed the model's {positions} positions, got {config.ctx_len}; "
            f"use {positions}"
        )


def usable_positions(model: PreTrainedModel) -> int | None:
    """Positions of a model that counts from its padding token's id on; None for all others.

    RoBERTa and its kin number tokens from padding_idx + 1, so that the rows of their table up to
    there are never used: 514 rows, padding_idx 1, sequences of 512. No config says so.
    """
    table = padded_positions(model)
    if table is None or table.padding_idx is None:
        return None
    return table.num_embeddings - table.padding_idx - 1


def padded_positions(model: nn.Module) -> nn.Embedding | None:
    """The embedding of positions of a model that counts them from its padding token's id on."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module.padding_idx is None:
            continue
        if name.endswith("position_embeddings"):
            return module
    return None


def load_weights(
    source: ModelSource,
    architecture: PreTrainedConfig,
    config: CollectConfig,
    head: Head | None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what of its weights the checkpoint lacks or has beyond them."""
    loader = loader_of(architecture, head)
    if loader is None:
        raise UsageError(f"{architecture.model_type} has no {head} head; use another model")

    def load(**options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        model, info = loader.from_pretrained(
            source.location,
            config=architecture,
            trust_remote_code=config.trust_remote_code,
            dtype=torch.float32 if config.autocast else getattr(torch, config.model_dtype),
            attn_implementation=config.attention,
            output_loading_info=True,
            **(weights_options() if source.gguf else {}),
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
            refuse_other_shapes(source, load(ignore_mismatched_sizes=True)[1])
            raise
    if source.gguf:
        forget_quantization(model)
    keep_in_memory(model)
    return model, info


def keep_in_memory(model: PreTrainedModel) -> None:
    """Copy weights that are still in their file: another program may write to it."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and not tensor.untyped_storage().resizable():
            tensor.data = tensor.data.clone()  # the storage was not torch's own


def loader_of(architecture: PreTrainedConfig, head: Head | None) -> Any | None:
    """The class that loads a model with this head; None where there is none.

    Models that also read images have their causal head in a class of their own.
    """
    loaders: dict[Head | None, tuple[Any, ...]] = {
        None: (AutoModel,),
        "causal": (AutoModelForCausalLM, AutoModelForImageTextToText),
        "masked": (AutoModelForMaskedLM,),
    }
    of_model = getattr(architecture, "auto_map", None) or {}  # code that comes with the model
    for loader in loaders[head]:
        if head is None or loader.__name__ in of_model:
            return loader
        if type(architecture) in loader._model_mapping:
            return loader
    return None


@contextmanager
def quiet_load_report() -> Iterator[None]:
    """Hides the table of weights a base model leaves unused; missing ones are checked."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


# --- identity ---


def model_digest(model: PreTrainedModel) -> str:
    """sha256 of the architecture and the weights as computed with, however they are stored.

    Of code that came with the model too, where there is any.
    """
    digest = hashlib.sha256()
    settings = {k: v for k, v in model.config.to_diff_dict().items() if k not in VOLATILE}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    if (code := code_digest({type(module) for module in model.modules()})) is not None:
        digest.update(f"\0code {code}".encode())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Tokenizer) -> str | None:
    """sha256 of what turns text into tokens; not of padding and truncation, which calls change.

    None for a model without a tokenizer: its config, which tells the special tokens, is a part of
    the model's own digest.
    """
    if isinstance(tokenizer, ConfigTokens):
        return None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"padding": None, "truncation": None}
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [state, specials]
    if getattr(tokenizer, "split_special_tokens", False):
        content.append({"split_special_tokens": True})
    if (code := code_digest({type(tokenizer)})) is not None:
        content.append({"code": code})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def model_provenance(model: PreTrainedModel, source: ModelSource) -> dict[str, str | None]:
    """Where the model comes from and what computes it; `model_revision` is for the Hub alone."""
    return {
        "model": source.name if source.folder is None else short_name(source.name),
        "model_revision": source.commit,
        "model_class": type(model).__name__,
        "attention": model.config._attn_implementation,
        **{f"{library}_version": library_version(library) for library in LIBRARIES},
    }


def library_version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
