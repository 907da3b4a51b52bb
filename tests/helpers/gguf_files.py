"""Tiny .gguf files."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.models import tiny_config, tiny_tokenizer

gguf = pytest.importorskip("gguf")


WIDTH, TEMPLATE = 32, "{% for m in messages %}{{ m.content }}{% endfor %}"


def write_gguf(path: Path, *, architecture: str = "llama", seed: int = 0, fields=None) -> Path:
    """A tiny llama whose matrices are quantised to eight bits."""
    random = np.random.default_rng(seed)
    config = tiny_config("llama", hidden=WIDTH, mlp=64, layers=2)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // 2)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer)
    for name, value in (fields or {}).items():
        writer.add_uint32(name, value)
    for name, shape in shapes(config.vocab_size).items():
        values = random.normal(0, 0.3, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, 1 + values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer) -> None:
    vocabulary = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokens, "ab", "<spare>"])
    writer.add_token_types([1] * 256 + [3, 3, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template(TEMPLATE)


def shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    sizes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, WIDTH), "output_norm.weight": (WIDTH,),
    }  # fmt: skip
    for block in ("blk.0", "blk.1"):
        sizes |= {f"{block}.attn_{x}.weight": (WIDTH, WIDTH) for x in ("q", "k", "v", "output")}
        sizes |= {f"{block}.{x}_norm.weight": (WIDTH,) for x in ("attn", "ffn")}
        sizes |= {f"{block}.ffn_{x}.weight": (64, WIDTH) for x in ("gate", "up")}
        sizes[f"{block}.ffn_down.weight"] = (WIDTH, 64)
    return sizes
