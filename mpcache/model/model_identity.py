"""Digests that identify a model and its tokenizer, and the record of where they come from."""

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version

import torch
from transformers import PreTrainedModel

from mpcache.data.vocabulary import ConfigTokens, Tokenizer
from mpcache.model.fresh_remote_code import code_digest
from mpcache.model.model_source import ModelSource, short_name

# settings that may differ between copies of the same weights: folder, author, how the model runs
_VOLATILE = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
    "_model_name_or_path",  # a title in a .gguf file
}  # fmt: skip
_LIBRARIES = ("mpcache", "torch", "transformers", "tokenizers", "datasets", "zarr", "numpy")


def model_digest(model: PreTrainedModel) -> str:
    """sha256 of the architecture and of the weights as the model computes with them.

    How files store the weights does not matter. Code that comes with the model counts as well.
    """
    digest = hashlib.sha256()
    settings = {k: v for k, v in model.config.to_diff_dict().items() if k not in _VOLATILE}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    if (code := code_digest({type(module) for module in model.modules()})) is not None:
        digest.update(f"\0code {code}".encode())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Tokenizer) -> str | None:
    """sha256 of all that turns text into tokens, without padding and truncation.

    None for a model without a tokenizer: the model's own digest covers its config, which names the
    special tokens.
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
    """Source of the model, and the libraries that run it. Only Hub models have a revision."""
    return {
        "model": source.name if source.folder is None else short_name(source.name),
        "model_revision": source.commit,
        "model_class": type(model).__name__,
        "attention": model.config._attn_implementation,
        **{f"{library}_version": library_version(library) for library in _LIBRARIES},
    }


def library_version(library: str) -> str | None:
    """The installed version; None for a library that is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None
