"""MODEL -> the base model, its tokenizer, and what identifies them."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mpcache.config import CollectConfig
from mpcache.heap import keep_freed_memory
from mpcache.hub import explained, first_line, names_a_place
from mpcache.tokenised import TokenIds, Tokenizer

# what differs between two copies of the same weights: where they lie, who wrote them, how they run
VOLATILE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
LIBRARIES = ("mpcache", "torch", "transformers", "tokenizers", "datasets", "zarr", "numpy")


def resolve_device(name: str) -> torch.device:
    """`auto` takes the first GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise ValueError(
            f"device must be a torch device here, got {name} ({first_line(error)}); use auto"
        ) from error
    return torch.device(name)


def load_tokenizer(config: CollectConfig) -> Tokenizer:
    """The model's tokenizer, or the token ids that its config tells where it has none.

    Raises ValueError where it is a slow one, ConnectionError without the Hub.
    """
    source = model_source(config)
    if Path(source).is_dir() and not has_tokenizer(Path(source)):
        return token_ids(config)
    with explained(f"tokenizer of {config.model}", config.revision):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer must be a fast one, got {type(tokenizer).__name__} in {config.model}; "
            "convert it to tokenizer.json"
        )
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has a vocabulary: without one, some classes make one of a token."""
    patterns = ("tokenizer.*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def token_ids(config: CollectConfig) -> TokenIds:
    """What the model's config says of its tokens."""
    with explained(f"model {config.model}", config.revision):
        architecture = AutoConfig.from_pretrained(
            model_source(config),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    text = architecture.get_text_config()
    if not isinstance(size := getattr(text, "vocab_size", None), int):
        raise ValueError(f"the model {config.model} has neither a tokenizer nor a vocab_size")
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    return TokenIds(size, *(_first_id(getattr(text, name, None), size) for name in names))


def _first_id(value: Any, size: int) -> int | None:
    """A token's id; some configs list several, and some name one that they do not have."""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) and 0 <= first < size else None


def load_model(
    config: CollectConfig, *, with_head: bool = False, tokenizer: Tokenizer | None = None
) -> tuple[PreTrainedModel, Tokenizer]:
    """The base model, or the causal language model around it, and its tokenizer.

    The model is on its device and frozen.

    Raises ValueError where the user can help it, ConnectionError where the Hub could not be asked.
    """
    device, tokenizer = resolve_device(config.device), tokenizer or load_tokenizer(config)
    if device.type == "cpu":
        keep_freed_memory()
    with explained(f"model {config.model}", config.revision):
        architecture = AutoConfig.from_pretrained(
            model_source(config),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    check_architecture(architecture, config)
    model, missing = load_weights(architecture, config, with_head)
    if (positions := usable_positions(model)) is not None:
        check_positions(positions, config)
    if any(key.startswith("pooler.") for key in missing):
        # encoders trained without a pooler get a random one, which no run could reproduce
        model.register_module("pooler", None)
    if missing := {key for key in missing if not key.startswith("pooler.")}:
        raise ValueError(
            f"the weights of {config.model} must fill {type(model).__name__}, got none for "
            f"{', '.join(sorted(missing)[:3])}; use another checkpoint"
        )
    model.train(False).requires_grad_(False)
    model.to(device)  # type: ignore[arg-type]  # hidden by a decorator
    if config.autocast:
        lower = torch.autocast(device.type, getattr(torch, config.model_dtype))
        model.forward = lower(model.forward)
    return model, tokenizer


def model_source(config: CollectConfig) -> str:
    """A folder here, else a Hub id."""
    path = Path(config.model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(f"a model folder must hold config.json, got {path}; check the path")
        return str(path)
    if names_a_place(config.model):
        raise ValueError(f"model must exist, got {config.model}; check the path")
    return config.model


def check_architecture(architecture: PreTrainedConfig, config: CollectConfig) -> None:
    if architecture.is_encoder_decoder:
        raise ValueError(
            f"a model must be a decoder or an encoder, got the encoder-decoder "
            f"{architecture.model_type}; use another"
        )
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        check_positions(positions, config)


def check_positions(positions: int, config: CollectConfig) -> None:
    if positions < config.ctx_len:
        raise ValueError(
            f"ctx_len must not exceed the model's {positions} positions, got {config.ctx_len}; "
            f"use {positions}"
        )


def usable_positions(model: PreTrainedModel) -> int | None:
    """Positions of a model that counts from its padding token's id on; None for all others.

    RoBERTa and its kin number tokens from padding_idx + 1, so that the rows of their table up to
    there are never used: 514 rows, padding_idx 1, sequences of 512. No config says so.
    """
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Embedding)
            and module.padding_idx is not None
            and name.endswith("position_embeddings")
        ):
            return module.num_embeddings - module.padding_idx - 1
    return None


def load_weights(
    architecture: PreTrainedConfig, config: CollectConfig, with_head: bool
) -> tuple[PreTrainedModel, set[str]]:
    """The model and the names of weights that the checkpoint lacks."""
    loader: Any = AutoModelForCausalLM if with_head else AutoModel  # hidden by a decorator
    with explained(f"model {config.model}", config.revision), quiet_load_report():
        try:
            model, info = loader.from_pretrained(
                model_source(config),
                config=architecture,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                dtype=torch.float32 if config.autocast else getattr(torch, config.model_dtype),
                attn_implementation=config.attention,
                output_loading_info=True,
            )
        except ImportError as error:  # flash_attention_2 that is not installed
            raise ValueError(f"{first_line(error)}; use attention=sdpa") from error
    return model, set(info["missing_keys"])


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
    """sha256 of the architecture and the weights as computed with, however they are stored."""
    digest = hashlib.sha256()
    settings = {k: v for k, v in model.config.to_diff_dict().items() if k not in VOLATILE}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Tokenizer) -> str | None:
    """sha256 of what turns text into tokens; not of padding and truncation, which calls change.

    None for a model without a tokenizer: its config, which tells the special tokens, is a part of
    the model's own digest.
    """
    if isinstance(tokenizer, TokenIds):
        return None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"padding": None, "truncation": None}
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([state, specials], sort_keys=True).encode()).hexdigest()


def model_provenance(model: PreTrainedModel, config: CollectConfig) -> dict[str, str | None]:
    """Where the model comes from and what computes it; `model_revision` is None for a folder."""
    is_folder = Path(config.model).expanduser().is_dir()
    return {
        "model": Path(config.model).expanduser().resolve().name if is_folder else config.model,
        "model_revision": None if is_folder else getattr(model.config, "_commit_hash", None),
        "model_class": type(model).__name__,
        "attention": model.config._attn_implementation,
        **{f"{library}_version": library_version(library) for library in LIBRARIES},
    }


def library_version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
