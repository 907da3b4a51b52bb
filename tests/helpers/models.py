"""Tiny language models and a tiny tokenizer, the same in every process, for tests of any stage."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModel,
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mpcache.model.hookpoint_patterns import Side
from mpcache.model.hooks import Capture

VOCABULARY = 260  # 256 bytes, BOS, EOS, two spare
SIZES = {"hidden": 16, "layers": 3, "heads": 2, "mlp": 32, "positions": 64}


def tiny_config(name: str, **sizes: int) -> PreTrainedConfig:
    """`name`: llama, gpt2, neox, bert or modernbert; `sizes` override SIZES."""
    size = SIZES | sizes
    usual = {
        "vocab_size": VOCABULARY,
        "hidden_size": size["hidden"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "intermediate_size": size["mlp"],
        "max_position_embeddings": size["positions"],
    }
    if name == "gpt2":
        return GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=size["hidden"],
            n_layer=size["layers"],
            n_head=size["heads"],
            n_inner=size["mlp"],
            n_positions=size["positions"],
        )
    kinds = {"llama": LlamaConfig, "neox": GPTNeoXConfig, "bert": BertConfig}
    if name == "modernbert":
        return ModernBertConfig(**usual, pad_token_id=0, local_attention=8)
    return kinds[name](**usual)


def tiny_model(name: str = "llama", seed: int = 0, **sizes: int) -> PreTrainedModel:
    """A base model with random weights, in float32 on the CPU, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(tiny_config(name, **sizes), attn_implementation="sdpa")
        with torch.no_grad():  # freshly initialised layers hardly differ from the identity
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.3)
    return model.eval().requires_grad_(False)


def tiny_tokenizer(bos: str | None = "<s>", eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """One token per byte, ids 0 to 255 in the order of the byte alphabet; BOS 256, EOS 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(tokenizer_models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


def save_tiny(folder: Path, name: str = "llama", seed: int = 0, **sizes: int) -> Path:
    """Save model and tokenizer to a folder that MODEL can name."""
    tiny_model(name, seed, **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def captured(capture: Capture, inputs: Mapping[str, torch.Tensor]) -> dict[Side, torch.Tensor]:
    """Copies of the values that one forward pass captures, in the order of the sides."""
    copies: dict[Side, torch.Tensor] = {}
    capture.run(inputs, lambda side, value: copies.update({side: value.clone()}))
    return {side: copies[side] for side in capture.sides}


@contextmanager
def transformers_log() -> Iterator[list[logging.LogRecord]]:
    """Messages that transformers logs: its logger does not propagate, so caplog misses them."""
    records: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("transformers")
    handler.emit = records.append
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)
