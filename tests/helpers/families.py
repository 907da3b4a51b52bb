"""Tiny models of many families, and how each family separates documents."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel

from mpcache.model.hookpoint_patterns import Side, resolve_sides

VOCABULARY = 260
POSITIONS = 160
WINDOW = 8

USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": POSITIONS}
GPT |= {"bos_token_id": 1, "eos_token_id": 2}
BARE = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3}
OFFSET = {"pad_token_id": 1, "max_position_embeddings": POSITIONS + 2}
KV = {"num_key_value_heads": 1, "head_dim": 8}
ONE_KV = {"num_key_value_heads": 1}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "num_key_value_heads": 2,
}  # fmt: skip
SLIDING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
GATED_DELTA = LINEAR | {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
CONV = {"layer_types": ["conv", "full_attention", "conv"]}


@dataclass(frozen=True)
class Family:
    """A tiny model, and how it separates documents."""

    name: str
    packed: str
    "packed into sequences: the separation, or the class of the module that lets information flow"
    alone: str = "alone"
    "each document in a sequence of its own"
    settings: dict[str, Any] = field(default_factory=dict)
    usual: dict[str, Any] = field(default_factory=lambda: USUAL)
    kind: str = ""
    "the config's model_type, where it is not the name"
    attention: str = "sdpa"
    hookpoint: str = ""
    "without one: all layers"
    is_fast: bool = False

    def __str__(self) -> str:
        return self.name

    def model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        config = CONFIG_MAPPING[self.kind or self.name](**(self.usual | self.settings))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModel.from_config(config, attn_implementation=self.attention)
            with torch.no_grad():  # freshly initialised layers hardly differ from the identity
                for name, parameter in model.named_parameters():
                    if parameter.ndim == 2 and name.endswith("weight"):
                        parameter.normal_(0, 0.3)
        return model.eval().requires_grad_(False).to(dtype)

    def sides(self, model: PreTrainedModel) -> tuple[Side, ...]:
        lists = (
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) > 1
        )
        return resolve_sides([self.hookpoint or f"{next(lists)}.*"], model)


def _family(name: str, packed: str, *, fast: bool = False, **changes: Any) -> Family:
    known = {key: changes.pop(key) for key in Family.__annotations__ if key in changes}
    settings = {**known.pop("settings", {}), **changes}
    return Family(name, packed, settings=settings, is_fast=fast, **known)


def _positions(name: str, settings: dict[str, Any] = KV, **changes: Any) -> Family:
    return _family(name, "positions", settings=settings, **changes)


def _encoder(name: str, **changes: Any) -> Family:
    return _family(name, "mask", **({"alone": "alone with mask"} | changes))


FAMILIES = [
    # positions that restart: the model makes its mask of documents from them
    _positions("llama", fast=True),
    _positions("mistral", sliding_window=WINDOW),
    _positions("ministral", sliding_window=WINDOW),
    _positions("qwen2"),
    _positions(
        "qwen2_window", kind="qwen2", use_sliding_window=True, sliding_window=WINDOW,
        max_window_layers=1,
    ),
    _positions("qwen3"),
    _positions("qwen2_moe", KV | MOE, shared_expert_intermediate_size=16),
    _positions("qwen3_moe", KV | MOE, fast=True),
    _positions("gemma"),
    _positions("gemma2", attention="eager", sliding_window=WINDOW, query_pre_attn_scalar=8),
    _positions("gemma3_text", KV | SLIDING, query_pre_attn_scalar=8, fast=True),
    _positions(
        "gemma3n_text", KV | SLIDING, hookpoint="layers.*.mlp:output", altup_num_inputs=2,
        vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8, laurel_rank=4,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 3,
    ),
    _positions("phi", {}),
    _positions("phi3", ONE_KV, sliding_window=WINDOW),
    _positions("phimoe", ONE_KV | LOCAL_MOE, sliding_window=None),
    _positions("gpt2", {}, usual=GPT, fast=True),
    _positions("gpt_bigcode", {}, usual=GPT),
    _positions(
        "gpt_neo", {}, attention="eager", num_layers=3, num_heads=2, window_size=WINDOW,
        attention_types=[[["global", "local", "global"], 1]],
    ),
    _positions("gpt_neox", {}),
    _positions("gptj", {}, usual=GPT, attention="eager", rotary_dim=4),
    _positions("codegen", {}, usual=GPT | {"n_head": 4}, attention="eager", rotary_dim=4),
    _positions("ctrl", {}, usual=GPT, attention="eager", dff=32),
    _positions("olmo"),
    _positions("olmo2"),
    _positions("olmo3", KV | SLIDING),
    _positions("olmoe", {}, num_experts=4, num_experts_per_tok=2),
    _positions("cohere"),
    _positions("cohere2", KV | SLIDING),
    _positions("granite"),
    _positions("granitemoe", ONE_KV | LOCAL_MOE),
    _positions("mixtral", KV | LOCAL_MOE, sliding_window=None),
    _positions("deepseek_v2", ROUTED | LATENT, n_group=None, topk_group=None),
    _positions("deepseek_v3", ROUTED | LATENT, n_group=2, topk_group=1),
    _positions("glm"),
    _positions("glm4"),
    _positions("glm4_moe", KV | ROUTED, n_group=1, topk_group=1),
    _positions("smollm3", no_rope_layers=[1, 0, 1]),
    _positions("starcoder2", ONE_KV, sliding_window=WINDOW),
    _positions("stablelm", ONE_KV),
    _positions("nemotron"),
    _positions("minimax_m2", KV | LOCAL_MOE),
    _positions(
        "llama4_text", KV | LOCAL_MOE | {"num_experts_per_tok": 1}, attention_chunk_size=16,
        intermediate_size_mlp=32, no_rope_layers=[1, 0, 1],
    ),
    _positions("ernie4_5"),
    _positions("exaone4", KV | SLIDING),
    _positions("helium"),
    _positions("persimmon", {}),
    _positions("diffllama", {}, num_key_value_heads=2),
    _positions("modernbert-decoder", {}, local_attention=16, global_attn_every_n_layers=2),
    # a causal mask of documents, with the window where layers have one
    _family(
        "gpt_oss", "causal mask", settings=KV | LOCAL_MOE | SLIDING, attention="eager", fast=True
    ),
    _family("opt", "causal mask", ffn_dim=32, word_embed_proj_dim=16),
    _family("falcon", "causal mask", alibi=False, new_decoder_architecture=False, fast=True),
    _family("biogpt", "causal mask"),
    # a mask of documents in encoders
    _encoder("bert", fast=True),
    _encoder("roberta", settings=OFFSET, fast=True),
    _encoder("xlm-roberta", settings=OFFSET),
    _encoder("camembert", settings=OFFSET),
    _encoder("mpnet", settings=OFFSET, attention="eager"),
    _encoder(
        "distilbert", usual={"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS},
        dim=16, n_layers=3, n_heads=2, hidden_dim=32,
    ),
    _encoder("electra", embedding_size=16),
    _encoder("albert", embedding_size=16, hookpoint="encoder"),
    _encoder("modernbert", local_attention=WINDOW, global_attn_every_n_layers=2, fast=True),
    _encoder("nomic_bert"),
    _encoder("eurobert", settings=KV),
    _encoder("rembert", attention="eager", input_embedding_size=16, output_embedding_size=16),
    # ALiBi counts from the sequence's start or end
    _family(
        "bloom", "BloomAttention", attention="eager", fast=True,
        usual={"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 3, "n_head": 2},
    ),
    _family(
        "mpt", "MptAttention", attention="eager", usual={"vocab_size": VOCABULARY},
        d_model=16, n_layers=3, n_heads=2, max_seq_len=POSITIONS,
    ),
    _family("falcon_alibi", "FalconAttention", kind="falcon", alibi=True),
    # states of linear attention and state-space layers
    _family(
        "qwen3_next", "Qwen3NextGatedDeltaNet", settings=KV | MOE | GATED_DELTA,
        shared_expert_intermediate_size=16, fast=True,
    ),
    _family("qwen3_5_text", "Qwen3_5GatedDeltaNet", settings=KV | GATED_DELTA),
    _family(
        "minimax", "MiniMaxLightningAttention", settings=KV | LOCAL_MOE | LINEAR, block_size=16
    ),
    _family("mamba", "MambaMixer", usual=BARE, attention="eager", state_size=4),
    _family(
        "mamba2", "Mamba2Mixer", usual=BARE, attention="eager", state_size=8, num_heads=4,
        head_dim=8, n_groups=1, chunk_size=16, fast=True,
    ),
    _family("falcon_mamba", "FalconMambaMixer", usual=BARE, attention="eager", state_size=4),
    _family("falcon_h1", "FalconH1Mixer", settings=KV | MAMBA, mamba_d_ssm=32, mamba_n_groups=1),
    _family(
        "granitemoehybrid", "GraniteMoeHybridMambaLayer", settings=ONE_KV | LOCAL_MOE | MAMBA,
        layer_types=["mamba", "attention", "mamba"], shared_intermediate_size=16,
    ),
    _family(
        "jamba", "JambaMambaMixer", settings=ONE_KV, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, num_experts=2, num_experts_per_tok=1,
        mamba_d_state=4, mamba_dt_rank=4,
    ),
    _family(
        "bamba", "BambaMixer", settings=ONE_KV | MAMBA, attn_layer_indices=[1], mamba_n_groups=1
    ),
    _family(
        "zamba2", "Zamba2MambaMixer", layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=8, n_mamba_heads=4, mamba_headdim=8, mamba_ngroups=1, chunk_size=16,
        num_mem_blocks=1, adapter_rank=4, num_key_value_heads=2, attention_head_dim=16,
    ),
    _family(
        "nemotron_h", "NemotronHMamba2Mixer", settings=KV, hybrid_override_pattern="M*-",
        mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=16,
    ),
    _family(
        "recurrent_gemma", "RecurrentGemmaRecurrentBlock", settings=ONE_KV, lru_width=16,
        attention_window_size=WINDOW, block_types=["recurrent", "recurrent", "attention"],
    ),
    # token shift
    _family(
        "rwkv", "RwkvSelfAttention", usual=BARE, attention="eager", attention_hidden_size=16,
        context_length=POSITIONS, fast=True,
    ),
    # short convolutions
    _family("lfm2", "Lfm2ShortConv", settings=ONE_KV | CONV, fast=True),
    _family("lfm2_moe", "Lfm2MoeShortConv", settings=ONE_KV | CONV | MOE, num_dense_layers=1),
    # encoders that take no mask of documents
    _family(
        "deberta-v2", "DebertaV2Attention", alone="alone with mask", attention="eager",
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True,
    ),
    _family("esm", "EsmAttention", alone="alone with mask", settings=OFFSET, attention="eager"),
    _family("roformer", "RoFormerAttention", alone="alone with mask", attention="eager"),
    # encoders in which padding reaches tokens despite its mask
    _family("convbert", "ConvBertAttention", alone="alone unpadded", attention="eager"),
    _family("nystromformer", "NystromformerAttention", alone="alone unpadded", attention="eager"),
    _family(
        "mobilebert", "Linear", alone="alone unpadded", attention="eager", embedding_size=16,
        intra_bottleneck_size=16, fast=True,
    ),
]  # fmt: skip
