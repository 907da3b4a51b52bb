"""MODEL -> the base model, its tokenizer, and what identifies them."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
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
from mpcache.heap import keep_freed_memory
from mpcache.hub import explained, first_line, names_a_place

# what differs between two copies of the same weights: where they lie, who wrote them, how they run
VOLATILE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
Head = Literal["causal", "masked"]
LIBRARIES = ("mpcache", "torch", "transformers", "tokenizers", "datasets", "zarr", "numpy")


class MissingWeights(ValueError):
    """A checkpoint lacks weights of the model."""


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


def load_tokenizer(config: CollectConfig) -> PreTrainedTokenizerBase:
    """Raises ValueError where there is none, or a slow one, ConnectionError without the Hub."""
    source = model_source(config)
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


def load_model(
    config: CollectConfig, *, head: Head | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, or the language model with this head around it, and its tokenizer.

    The model is on its device and frozen.

    Raises ValueError where the user can help it, ConnectionError where the Hub could not be asked.
    """
    device, tokenizer = resolve_device(config.device), load_tokenizer(config)
    if device.type == "cpu":
        keep_freed_memory()
    with explained(f"model {config.model}", config.revision):
        architecture = AutoConfig.from_pretrained(
            model_source(config),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    check_architecture(architecture, config)
    model, missing = load_weights(architecture, config, head)
    if (positions := usable_positions(model)) is not None:
        check_positions(positions, config)
    if any(key.startswith("pooler.") for key in missing):
        # encoders trained without a pooler get a random one, which no run could reproduce
        model.register_module("pooler", None)
    if missing := {key for key in missing if not key.startswith("pooler.")}:
        raise MissingWeights(
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
    architecture: PreTrainedConfig, config: CollectConfig, head: Head | None
) -> tuple[PreTrainedModel, set[str]]:
    """The model and the names of weights that the checkpoint lacks."""
    loader = loader_of(architecture, head)
    if loader is None:
        raise ValueError(f"{architecture.model_type} has no {head} head; use another model")
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
    """sha256 of the architecture and the weights as computed with, however they are stored."""
    digest = hashlib.sha256()
    settings = {k: v for k, v in model.config.to_diff_dict().items() if k not in VOLATILE}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what turns text into tokens; not of padding and truncation, which calls change."""
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
