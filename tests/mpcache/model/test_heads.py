"""The kind of cross-entropy of a model, found by changing tokens, and its value."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedModel

from mpcache.collection.collect import collect
from mpcache.model.bert_masking import BertMasking
from mpcache.model.causality import is_causal, other_tokens
from mpcache.model.hookpoint_patterns import Side
from mpcache.model.splice import SplicedModel
from mptrain.coders.coder import Coder
from mptrain.config.coder import CoderConfig
from mptrain.config.sides import hookpoint_sides
from mptrain.data.filters import Filters
from mptrain.evals.loss_recovered import LossRecovered, Prediction, measure_loss_recovered
from tests.helpers.hookpoint_families import FAMILIES, GROUPED
from tests.helpers.models import tiny_tokenizer
from tests.helpers.stores import small_config

# --- causality ---

CAUSAL = {
    "llama": t.LlamaForCausalLM,
    "gemma3": t.Gemma3ForCausalLM,
    "gpt2": t.GPT2LMHeadModel,
    "mamba": t.MambaForCausalLM,
    "qwen3_moe": t.Qwen3MoeForCausalLM,
    "deepseek_v3": t.DeepseekV3ForCausalLM,
    "lfm2": t.Lfm2ForCausalLM,
    "llava": t.LlavaForConditionalGeneration,
    "qwen2_vl": t.Qwen2VLForConditionalGeneration,
}
BIDIRECTIONAL = {
    "bert": t.BertForMaskedLM,
    "modernbert": t.ModernBertForMaskedLM,
    "albert": t.AlbertForMaskedLM,
}


def logits_of(model: PreTrainedModel):
    def logits(inputs) -> Tensor:
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits.float()

    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "kind"), [*CAUSAL.items(), *BIDIRECTIONAL.items()])
def test_causality_is_seen(name: str, kind: type[PreTrainedModel], dtype: torch.dtype) -> None:
    model = strong(kind(FAMILIES[name]())).to(dtype).eval()
    inputs = {"input_ids": torch.randint(0, 250, (1, 33))}
    assert is_causal(logits_of(model), inputs) == (name in CAUSAL)


def test_a_decoder_of_berts_kind_is_causal() -> None:
    config = FAMILIES["bert"]()
    config.is_decoder = True
    model = strong(t.BertLMHeadModel(config)).eval()
    assert is_causal(logits_of(model), {"input_ids": torch.randint(0, 250, (1, 9))})


@pytest.mark.parametrize("at", [1, 17, 33, 49, 63])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_the_least_leak_is_seen(at: int, size: float) -> None:
    """One position of the model sees one token ahead, with a tiny weight."""

    def logits(inputs) -> Tensor:
        ids_BL = inputs["input_ids"]
        result = F.one_hot(ids_BL, 260).float()
        result[:, at - 1, 0] += 1 + size * ids_BL[:, at]
        return result

    assert not is_causal(logits, {"input_ids": torch.randint(0, 250, (1, 64))})


def test_noise_of_kernels_is_no_leak() -> None:
    """Last bits of kernels that depend on the batch, as with grouped experts, are no leak."""

    def noisy(inputs) -> Tensor:
        ids_BL = inputs["input_ids"]
        return F.one_hot(ids_BL, 260).float() + 1e-6 * torch.sin(ids_BL.sum().float())

    def leaking(inputs) -> Tensor:
        return noisy(inputs) + 1e-2 * inputs["input_ids"].sum(1)[:, None, None]

    inputs = {"input_ids": torch.randint(0, 250, (1, 64))}
    assert is_causal(noisy, inputs)
    assert not is_causal(leaking, inputs)


@given(ids=st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_others_differ_everywhere(ids: list[int]) -> None:
    ids_L = torch.tensor(ids)
    assert bool((other_tokens(ids_L) != ids_L).all())
    assert bool((other_tokens(ids_L) >= 0).all())


def strong(model: PreTrainedModel) -> PreTrainedModel:
    """Enlarge the weights: freshly initialised layers hardly differ from the identity."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    return model


# --- masking ---

MASKING = BertMasking(mask=7, specials={0, 1}, vocabulary=100)


@given(tokens=st.lists(st.integers(0, 99), min_size=1, max_size=300))
def test_masking(tokens: list[int]) -> None:
    tokens_L = np.array(tokens)
    shown_L, chosen_L = MASKING.hide(tokens_L)
    again_L, chosen_again_L = MASKING.hide(tokens_L.copy())
    assert (shown_L == again_L).all()
    assert (chosen_L == chosen_again_L).all()
    assert (shown_L[~chosen_L] == tokens_L[~chosen_L]).all()
    assert not np.isin(tokens_L[chosen_L], [0, 1, 7]).any()
    ordinary = int((~np.isin(tokens_L, [0, 1, 7])).sum())
    assert chosen_L.sum() == min(ordinary, max(1, round(0.15 * ordinary)))


def test_shares_of_masking() -> None:
    tokens_L = np.random.default_rng(0).integers(8, 100, 200_000)
    shown_L, chosen_L = MASKING.hide(tokens_L)
    shown, true = shown_L[chosen_L], tokens_L[chosen_L]
    assert (shown == 7).mean() == pytest.approx(0.8, abs=0.01)
    assert (shown == true).mean() == pytest.approx(0.1, abs=0.01)
    assert not np.isin(shown, [0, 1]).any()


# --- from collection to cross-entropy ---


def save(folder: Path, model: PreTrainedModel, mask: str | None = "[MASK]") -> Path:
    model.save_pretrained(folder / "model")
    tokenizer = tiny_tokenizer()
    if mask:
        tokenizer.add_special_tokens({"mask_token": AddedToken(mask, special=True)})
    tokenizer.save_pretrained(folder / "model")
    return folder


def collected(folder: Path, hookpoint: str, **changes: object) -> Path:
    config = small_config(folder, hookpoints=(hookpoint,), rows=800, **changes)
    collect(config, folder / "store")
    return folder / "store"


def spliced(folder: Path) -> SplicedModel:
    return SplicedModel(folder / "store", str(folder / "model"), "main", "cpu")


def scores(model: SplicedModel, hookpoint: str) -> LossRecovered:
    config = CoderConfig(
        **hookpoint_sides(hookpoint, "sae"), kind="sae", arch="mp", k=4, expansion=1
    )
    coder = Coder(config, 32, 32)
    coder.initialise_(torch.zeros(32), torch.zeros(32), torch.Generator().manual_seed(0))
    side = Side(hookpoint, "output")
    predictions = (
        Prediction(
            tokens_BL=e.tokens_BL,
            wanted_BL=e.wanted_BL,
            counts_BL=e.counts_BL,
            run=lambda new, e=e: model.logits(e.inputs, side, side, new),
        )
        for e in model.examples()
    )
    return measure_loss_recovered(coder, predictions, Filters(norm_limits={}))


@pytest.mark.parametrize("kind", [t.BertForMaskedLM, t.BertForPreTraining])
def test_bert_gets_masked_cross_entropy(tmp_path: Path, kind: type[PreTrainedModel]) -> None:
    """Also where the base model that was collected has a pooler, which the masked model lacks."""
    hookpoint = "encoder.layer.1"
    collected(save(tmp_path, strong(kind(FAMILIES["bert"]()))), hookpoint)
    model = spliced(tmp_path)
    assert model.head == "masked"
    spliced_scores = scores(model, hookpoint)
    figures = spliced_scores.figures(model.head)
    assert all(name.startswith("masked_") for name in figures)

    total, count = 0.0, 0
    for example in model.examples():
        labels_BL = example.tokens_BL.masked_fill(~example.counts_BL, -100)
        shown_BL = example.inputs["input_ids"]
        assert torch.equal(shown_BL[~example.counts_BL], example.tokens_BL[~example.counts_BL])
        n = int(example.counts_BL.sum())
        with torch.no_grad():
            total += float(model.model(input_ids=shown_BL, labels=labels_BL).loss) * n
        count += n
    assert spliced_scores.tokens == count > 0
    assert spliced_scores.ce_clean == pytest.approx(total / count, rel=1e-5)
    assert spliced_scores.ce_spliced != spliced_scores.ce_clean


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (t.BertModel(FAMILIES["bert"]()), "of a masked language-model head, got neither in"),
        (t.ElectraForPreTraining(t.ElectraConfig(**{
            k: v for k, v in FAMILIES["bert"]().to_dict().items() if k in GROUPED},
            embedding_size=32)), "of a masked language-model head, got neither in"),
    ],
)  # fmt: skip
def test_no_head_is_refused(tmp_path: Path, model: PreTrainedModel, message: str) -> None:
    collected(save(tmp_path, strong(model)), "encoder.layer.1")
    with pytest.raises(ValueError, match=message) as error:
        spliced(tmp_path)
    assert "\n" not in str(error.value)


def test_no_mask_token_is_refused(tmp_path: Path) -> None:
    model = strong(t.BertForMaskedLM(FAMILIES["bert"]()))
    collected(save(tmp_path, model, mask=None), "encoder.layer.1")
    with pytest.raises(ValueError, match="must have a mask token"):
        spliced(tmp_path)


def test_another_pooler_is_another_model(tmp_path: Path) -> None:
    model = strong(t.BertForPreTraining(FAMILIES["bert"]()))
    collected(save(tmp_path, model), "encoder.layer.1")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[3] += 1
    save(tmp_path, model)
    with pytest.raises(ValueError, match="collected from another model"):
        spliced(tmp_path)


@pytest.mark.parametrize(
    ("name", "hookpoint"),
    [
        ("llava", "language_model.layers.1.mlp"),
        ("qwen2_vl", "language_model.layers.1.mlp"),
        ("gemma3_images", "language_model.layers.1"),
        ("mistral3", "language_model.layers.1.mlp"),
        ("qwen3_moe", "layers.1.mlp"),
        ("gemma3n", "layers.1.input_layernorm"),
    ],
)
def test_text_models_of_several_parts(tmp_path: Path, name: str, hookpoint: str) -> None:
    kinds = CAUSAL | {
        "gemma3_images": t.Gemma3ForConditionalGeneration,
        "mistral3": t.Mistral3ForConditionalGeneration,
        "gemma3n": t.Gemma3nForCausalLM,
    }
    save(tmp_path, strong(kinds[name](FAMILIES[name]())), mask=None)
    collected(tmp_path, hookpoint)
    model = spliced(tmp_path)
    assert model.head == "causal"
    spliced_scores = scores(model, hookpoint)
    total, count = 0.0, 0
    for example in model.examples():
        ids_BL = example.tokens_BL
        with torch.no_grad():
            logits_BLV = model.model(input_ids=ids_BL, use_cache=False).logits.float()
        total += float(F.cross_entropy(logits_BLV[0, :-1], ids_BL[0, 1:], reduction="sum"))
        count += ids_BL[:, 1:].numel()
    assert spliced_scores.ce_clean == pytest.approx(total / count, rel=1e-5)
    assert spliced_scores.ce_spliced != spliced_scores.ce_clean
    assert json.dumps(spliced_scores.figures(model.head)).count("masked") == 0
