"""Tiny configs of many model families, for tests that go over all of them."""

from collections.abc import Callable

import transformers as t
from transformers import PreTrainedConfig

BASE = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
GROUPED = {**BASE, "num_key_value_heads": 2, "head_dim": 8}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
ROPE_IN_PARTS = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: t.LlamaConfig(**GROUPED),
    "gemma3": lambda: t.Gemma3TextConfig(
        **GROUPED, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "gemma2": lambda: t.Gemma2Config(**GROUPED),
    "olmo2": lambda: t.Olmo2Config(**GROUPED),
    "granite": lambda: t.GraniteConfig(**GROUPED, residual_multiplier=0.3),
    "bloom": lambda: t.BloomConfig(vocab_size=260, hidden_size=32, n_layer=3, n_head=4),
    "neox": lambda: t.GPTNeoXConfig(**BASE),
    "gpt2": lambda: t.GPT2Config(vocab_size=260, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "bert": lambda: t.BertConfig(**BASE),
    "modernbert": lambda: t.ModernBertConfig(
        **BASE, cls_token_id=256, sep_token_id=257, local_attention=8
    ),
    "albert": lambda: t.AlbertConfig(**BASE, embedding_size=16),
    "mamba": lambda: t.MambaConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=3, state_size=8
    ),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(**GROUPED, **EXPERTS, mlp_only_layers=[0]),
    "deepseek_v3": lambda: t.DeepseekV3Config(
        **BASE,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=16,
    ),
    "gpt_oss": lambda: t.GptOssConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "lfm2": lambda: t.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention", "conv"]),
    "gemma3n": lambda: t.Gemma3nTextConfig(
        **GROUPED,
        vocab_size_per_layer_input=260,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        activation_sparsity_pattern=[0.5, 0.0, 0.0],
    ),
    "llava": lambda: t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=t.LlamaConfig(**GROUPED),
        image_token_id=259,
    ),
    "qwen2_vl": lambda: t.Qwen2VLConfig(
        text_config={**GROUPED, "rope_parameters": ROPE_IN_PARTS},
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2
        },
        image_token_id=258,
        video_token_id=259,
        vision_start_token_id=254,
        vision_end_token_id=255,
    ),
    "gemma3_images": lambda: t.Gemma3Config(
        text_config=t.Gemma3TextConfig(**GROUPED),
        vision_config=t.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        image_token_id=259,
    ),
    "mistral3": lambda: t.Mistral3Config(
        vision_config=t.PixtralVisionConfig(**VISION),
        text_config=t.MistralConfig(**GROUPED),
        image_token_id=259,
    ),
}  # fmt: skip
