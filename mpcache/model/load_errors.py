"""Turns errors of `transformers` while it loads a model into one line with a remedy."""

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from mpcache.config import CollectConfig
from mpcache.errors import UsageError, first_line
from mpcache.hub_errors import hub_error
from mpcache.model.model_source import CONFIG, ModelSource

# packages that read the weights of each quantisation
_PACKAGES = {
    "gptq": "gptqmodel optimum",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "quanto": "optimum-quanto",
    "fbgemm_fp8": "fbgemm-gpu",
    "auto-round": "auto-round",
}
# explained already, or not a fault of the model: no memory, no Hub
_PASSED_ON = (UsageError, MemoryError, ConnectionError, torch.OutOfMemoryError)


@contextmanager
def explain_load_errors(source: ModelSource, thing: str, config: CollectConfig) -> Iterator[None]:
    """Turn errors of loading `thing`, "model" or "tokenizer of", into one line.

    Raises UsageError for faults of the files or settings, ConnectionError without the Hub. A full
    disk or memory passes unchanged.
    """
    try:
        yield
    except _PASSED_ON:
        raise
    except Exception as error:
        if (message := _known_message(error, source, config)) is not None:
            raise UsageError(message) from error
        if source.folder is None or not isinstance(error, ValueError):
            explanation = hub_error(error, f"{thing} {source.name}", source.revision)
            if explanation is not error or isinstance(error, OSError):
                raise explanation from error
        raise UsageError(_unknown_message(error, source, thing)) from error


def _known_message(error: Exception, source: ModelSource, config: CollectConfig) -> str | None:
    """The message for an error with a known cause and remedy; None for other errors."""
    text = str(error)
    is_unknown = re.search(r"has model type `(.*?)` but", text)
    has_code = "auto_map" in source.settings and not config.trust_remote_code
    if "trust_remote_code" in text or (is_unknown and has_code):
        return (
            f"{source.location} contains its own Python code, which mpcache does not run by "
            "default; read that code, then allow it with --trust-remote-code"
        )
    if "scaled_dot_product_attention" in text:
        return f"{text.split()[0]} has no SDPA attention; use --attention eager"
    if isinstance(error, ImportError) and (method := quantization(source)):
        return _quantized(source, method, error)
    if _is_about_attention(error, config):
        return f"{first_line(error).rstrip('.')}; use --attention sdpa or eager"
    if is_unknown:
        return (
            f"{source.location}/{CONFIG} has the model_type {is_unknown[1]!r}, which transformers "
            f"{version('transformers')} does not know; run pip install --upgrade transformers"
        )
    if "Should have a `model_type` key" in text:
        return (
            f"{source.location}/{CONFIG} must have a model_type, got none; use a complete "
            "checkpoint"
        )
    if "Couldn't instantiate the backend tokenizer" in text:
        return (
            f"{source.location} must have a tokenizer that can be read, got no tokenizer.json; "
            "copy the tokenizer files of the original model into this folder"
        )
    if source.gguf and "not supported" in text:
        return (
            f"{source.name}: {first_line(error)}; use its safetensors checkpoint, or run "
            "pip install --upgrade transformers"
        )
    if isinstance(error, ImportError):
        return f"{source.name} needs a package that is not installed: {first_line(error)}"
    return None


def _is_about_attention(error: Exception, config: CollectConfig) -> bool:
    is_flash = "flash" in config.attention and isinstance(error, ImportError | ValueError)
    return is_flash and any(word in str(error).lower() for word in ("flash", "attn", "attention"))


def quantization(source: ModelSource) -> str | None:
    """The quantisation method of the weights, from config.json; None without quantisation."""
    settings: Any = source.settings.get("quantization_config")
    return str(settings.get("quant_method")) if isinstance(settings, dict) else None


def _quantized(source: ModelSource, method: str, error: Exception) -> str:
    packages = _PACKAGES.get(method)
    remedy = f"run pip install {packages}" if packages else first_line(error)
    return (
        f"{source.location} is quantised by {method}, according to its {CONFIG}, and needs "
        f"packages that are not installed; {remedy}, or use an unquantised checkpoint"
    )


def _unknown_message(error: Exception, source: ModelSource, thing: str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # the first line of a validation error names the field, the second line the fault
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else first_line(error)
    if isinstance(error, pickle.UnpicklingError | EOFError):
        return f"the weights of {source.name} are damaged: {text}; download them again"
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    files = "tokenizer files" if thing.startswith("tokenizer") else f"{CONFIG} and weights"
    remedy = f"compare its {files} with the original, or download them again"
    if method := quantization(source):
        remedy = f"its weights are quantised by {method}: use an unquantised checkpoint"
    return f"{thing} {source.name} cannot be loaded: {kind}{text}; {remedy}"
