"""Checks of a checkpoint: its files before loading, and its weights after loading."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpcache.config import CollectConfig
from mpcache.errors import UsageError
from mpcache.model.file_integrity import TensorHeaders, check_json, check_safetensors, check_torch
from mpcache.model.file_snapshot import GENERATION, INDEX, TOKENIZER, weight_names
from mpcache.model.gguf import check_gguf
from mpcache.model.model_source import CONFIG, ModelSource

_FLOATS = {"F16", "BF16", "F32", "F64"}
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
_VOCABULARIES = ("vocab.json", "vocab.txt", "tekken.json")
# buffers that older versions saved and that no version needs
_LEFTOVERS = ("inv_freq", "masked_bias", "attn.bias", "attention.bias", "position_ids",
              "num_batches_tracked", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # fmt: skip


class MissingWeightsError(UsageError):
    """A checkpoint lacks weights of the model."""


# --- before ---


def check_tokenizer_files(source: ModelSource) -> None:
    """Raises UsageError for damaged tokenizer files, or without a tokenizer that can be read."""
    if source.gguf_path is not None:
        return check_gguf(source.gguf_path)
    files = {name: source.file(name) for name in TOKENIZER}
    for path in files.values():
        if path is not None:
            check_json(path)
    if (path := files["tokenizer.json"]) is not None:
        if not isinstance(check_json(path).get("model"), dict):
            raise UsageError(
                f"{path} holds no tokenizer, because the field 'model' is missing; use the file "
                "that came with the model"
            )
        return None
    return _check_without_tokenizer_json(source)


def _check_without_tokenizer_json(source: ModelSource) -> None:
    pieces = [name for name in _SENTENCEPIECE if source.file(name) is not None]
    if pieces and not any(source.file(name) for name in _VOCABULARIES):
        raise UsageError(
            f"{source.location} must have tokenizer.json, got only the SentencePiece file "
            f"{pieces[0]}; where the packages sentencepiece and protobuf are installed, convert "
            "it with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )


def has_tokenizer(source: ModelSource) -> bool:
    """Whether a model has a vocabulary. Without one, some classes make up a token."""
    if source.gguf is not None:
        return True
    if source.folder is None:
        names = ("tokenizer.json", "merges.txt", *_SENTENCEPIECE, *_VOCABULARIES)
        return any(source.file(name) is not None for name in names)
    patterns = ("tokenizer.*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
    return any(next(source.folder.glob(pattern), None) is not None for pattern in patterns)


def check_model_files(source: ModelSource) -> TensorHeaders:
    """Dtypes and shapes of the weights, from the headers of their files.

    Raises UsageError for damaged or missing files.
    """
    if source.gguf is not None:
        return {}  # checked with the tokenizer, which is in the same file
    if (path := source.file(GENERATION)) is not None:
        check_json(path)
    if not (names := weight_names(source)):
        raise UsageError(
            f"{source.location} must have weights, got neither model.safetensors nor "
            "pytorch_model.bin; download the weights into this folder"
        )
    headers: TensorHeaders = {}
    for name in names:
        path = source.file(name)
        assert path is not None
        if name.endswith(".safetensors"):
            headers |= check_safetensors(path)
        elif not name.endswith(INDEX):
            headers |= check_torch(path)
    return headers


def check_settings(source: ModelSource) -> None:
    """Raises UsageError where `config.json` is not that of a model."""
    if source.gguf is not None:
        return
    settings = source.settings
    if not isinstance(settings.get("model_type"), str) and "auto_map" not in settings:
        raise UsageError(
            f"{source.file(CONFIG)} must have a model_type, got "
            f"{settings.get('model_type')!r}; use the config.json of the original model"
        )
    if not isinstance(settings.get("quantization_config", {}), dict | None):
        raise UsageError(
            f"{source.file(CONFIG)} must have an object as its quantization_config, got "
            f"{settings['quantization_config']!r}; use the config.json of the original model"
        )


# --- after ---


def check_no_mismatched_shapes(source: ModelSource, info: dict[str, Any]) -> None:
    """Raises UsageError with the first weights that the model has in another shape."""
    different = sorted(map(tuple, info["mismatched_keys"]))
    if different:
        name, stored, wanted = different[0][:3]
        more = f", and {len(different) - 1} more" if different[1:] else ""
        raise UsageError(
            f"the weights of {source.name} must fit its {CONFIG}, got {name} of shape "
            f"{list(stored)} instead of {list(wanted)}{more}; use the config.json that belongs "
            "to these weights"
        )


def check_loaded(
    model: PreTrainedModel, source: ModelSource, info: dict[str, Any], tensors: TensorHeaders
) -> None:
    """Raises UsageError where weights are missing, unused, or integers."""
    missing = set(info["missing_keys"])
    if any(key.startswith("pooler.") for key in missing):
        # encoders without a trained pooler get a random pooler, which no run could reproduce
        model.register_module("pooler", None)
    if missing := {key for key in missing if not key.startswith("pooler.")}:
        raise MissingWeightsError(
            f"the weights of {source.name} must be complete for {type(model).__name__}, got none "
            f"for {_first(missing)}; use another checkpoint"
        )
    if unused := [key for key in info["unexpected_keys"] if _is_of(key, model)]:
        raise UsageError(
            f"the weights of {source.name} must fit its {CONFIG}, got {len(unused)} tensors that "
            f"{type(model).__name__} does not use: {_first(unused)}; use the config.json that "
            "belongs to these weights"
        )
    check_floating_point(model, source, tensors)


def _first(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:3])


def _is_of(key: str, model: PreTrainedModel) -> bool:
    """Whether a tensor belongs to the base model, and not to a head that is not loaded."""
    if key.endswith(_LEFTOVERS) or "lm_head" in key.split("."):  # a text model's own, in LLaVA
        return False
    base = model.base_model
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    children = {
        name for name, child in base.named_children() if any(True for _ in child.children())
    }
    return key.removeprefix(prefix).split(".")[0] in children


def check_floating_point(
    model: PreTrainedModel, source: ModelSource, tensors: TensorHeaders
) -> None:
    """Raises UsageError where integers would be loaded as weights."""
    if source.settings.get("quantization_config"):
        return
    other = {name: dtype for name, (dtype, _) in tensors.items() if dtype not in _FLOATS}
    if not other:
        return
    weights = [name for name, value in model.named_parameters() if value.is_floating_point()]
    for name, dtype in sorted(other.items()):
        if any(name == weight or name.endswith(f".{weight}") for weight in weights):
            raise UsageError(
                f"the weights of {source.name} must be floating-point numbers, got {name} as "
                f"{dtype}; use an unquantised checkpoint"
            )


def check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: CollectConfig
) -> None:
    """Raises UsageError for a tokenizer with ids that have no embedding.

    Special tokens without an embedding, such as those for images, are allowed where no text can
    produce them.
    """
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if not isinstance(rows, int):
        return
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if not config.parse_special_tokens:
        ends = {tokenizer.bos_token, tokenizer.cls_token, tokenizer.eos_token, tokenizer.sep_token}
        specials = set(tokenizer.all_special_tokens) | _special_tokens(tokenizer)
        beyond = {t: i for t, i in beyond.items() if t in ends or t not in specials}
    if beyond:
        token, number = max(beyond.items(), key=lambda item: item[1])
        raise UsageError(
            f"every token id of {config.model} must be below {rows}, the size of the model's "
            f"embedding, got {number} for {token!r}; use the model's own tokenizer"
        )


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
