"""Laws of a language model with any coder spliced into it."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

from mpcache.collection.collect import collect
from mpcache.model.hookpoint_patterns import Side
from mpcache.model.model_identity import model_digest
from mpcache.model.splice import SplicedModel
from mpcache.store.object_paths import BY_ASSISTANT
from mpcache.store.reader import open_store
from mptrain.coders.coder import Coder
from mptrain.config.coder import CoderConfig
from mptrain.config.sides import hookpoint_sides
from mptrain.data.filters import Filters
from mptrain.evals.loss_recovered import Prediction, measure_loss_recovered
from tests.helpers.chats import chat_config, chat_store
from tests.helpers.models import save_tiny, tiny_tokenizer
from tests.helpers.stores import small_config, small_store


@pytest.fixture(scope="module")
def spliced_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SplicedModel]:
    folder = tmp_path_factory.mktemp("splice")
    save_tiny(folder / "model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=260, intermediate_size=32, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20 if parameter.ndim == 2 else 1)
    model.save_pretrained(folder / "model")
    store, _ = small_store(folder)
    return store, SplicedModel(store, str(folder / "model"), "main", "cpu")


def scores(spliced: SplicedModel, coder: Coder, skip_positions: int = 0, only_tokens: str = "all"):
    source, target = (Side.parse(side) for side in (*coder.config.inputs, *coder.config.targets))
    predictions = (
        Prediction(
            tokens_BL=e.tokens_BL,
            wanted_BL=e.wanted_BL,
            counts_BL=e.counts_BL,
            by_assistant_BL=e.by_assistant_BL,
            run=lambda new, e=e: spliced.logits(e.inputs, source, target, new),
        )
        for e in spliced.examples()
    )
    filters = Filters(skip_positions=skip_positions, norm_limits={}, only_tokens=only_tokens)
    return measure_loss_recovered(coder, predictions, filters)


def coder(hookpoint: str = "layers.1.mlp", expansion: int = 1, k: int = 16) -> Coder:
    config = CoderConfig(
        **hookpoint_sides(hookpoint, "sae"), kind="sae", arch="mp", k=k, expansion=expansion
    )
    zeroed = Coder(config, 16, 16)
    zeroed.initialise_(torch.zeros(16), torch.zeros(16), torch.Generator().manual_seed(0))
    return zeroed


@pytest.mark.parametrize("hookpoint", ["layers.0", "layers.1.mlp"])
def test_a_perfect_coder_loses_nothing(
    spliced_model: tuple[Path, SplicedModel], hookpoint: str
) -> None:
    perfect = coder(hookpoint, expansion=2, k=32)
    with torch.no_grad():
        perfect.encoder.W_MD.copy_(torch.cat([torch.eye(16), -torch.eye(16)]))
    measured = scores(spliced_model[1], perfect)
    assert measured.ce_spliced == pytest.approx(measured.ce_clean, abs=1e-4)
    assert measured.kl == pytest.approx(0, abs=1e-5)
    assert measured.ce_recovered == pytest.approx(1, abs=1e-3)


def test_a_coder_that_predicts_zero_recovers_nothing(
    spliced_model: tuple[Path, SplicedModel],
) -> None:
    nothing = coder()
    with torch.no_grad():
        nothing.encoder.W_MD.fill_(0)
    measured = scores(spliced_model[1], nothing)
    assert measured.ce_spliced == pytest.approx(measured.ce_zero)
    assert measured.ce_recovered == pytest.approx(0, abs=1e-6)
    assert measured.kl > 0
    assert scores(spliced_model[1], nothing, skip_positions=16).kl == pytest.approx(0, abs=1e-6)


def test_clean_cross_entropy_is_the_models_own(spliced_model: tuple[Path, SplicedModel]) -> None:
    spliced = spliced_model[1]
    total, tokens = 0.0, 0
    for example in spliced.examples():
        ids = example.tokens_BL
        total += float(spliced.model(ids, labels=ids).loss) * ids[:, 1:].numel()
        tokens += ids[:, 1:].numel()
    measured = scores(spliced, coder())
    assert measured.tokens == tokens > 0
    assert measured.ce_clean == pytest.approx(total / tokens, rel=1e-5)


def test_another_model_is_refused(spliced_model: tuple[Path, SplicedModel], tmp_path: Path) -> None:
    store, spliced = spliced_model
    assert model_digest(spliced.model.base_model) == spliced.store.identity["model_digest"]
    other = copy.deepcopy(spliced.model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
        other.model.norm.weight[0] += 1
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="collected from another model"):
        SplicedModel(store, str(tmp_path / "other"), "main", "cpu")


def with_head(folder: Path) -> None:
    """Give the tiny model of a folder a head."""
    base = AutoModel.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(base.config)
    model.base_model.load_state_dict(base.state_dict())
    model.save_pretrained(folder)


def test_only_the_assistants_tokens_are_replaced(tmp_path: Path) -> None:
    config = chat_config(tmp_path)
    with_head(Path(config.model))
    path, _ = chat_store(tmp_path)
    spliced, store = SplicedModel(path, config.model, "main", "cpu"), open_store(path)
    parts = [p for p in store.part_numbers("tokens") if store.layout.split_of(p) == "validation"]
    flags = np.concatenate([store.tokens.read_flags(p).reshape(-1) for p in parts])  # type: ignore[union-attr]
    written = torch.cat([e.by_assistant_BL.flatten() for e in spliced.examples()])
    assert written.tolist() == ((flags & BY_ASSISTANT) > 0).tolist()
    assert 0 < written.double().mean() < 1
    nothing = coder()
    with torch.no_grad():
        nothing.encoder.W_MD.fill_(0)
    every, own = (scores(spliced, nothing, only_tokens=name) for name in ("all", "assistant"))
    assert 0 < own.kl < every.kl
    assert own.ce_clean == every.ce_clean


def test_no_prediction_across_documents_that_are_apart(tmp_path: Path) -> None:
    """Packed or alone, the same documents have the same cross-entropy."""
    small = {"hookpoints": ("layers.1.mlp",), "rows": 400}
    config = small_config(tmp_path, cross_document_attention=False, **small)
    with_head(Path(config.model))
    collect(config, tmp_path / "packed")
    spliced = SplicedModel(tmp_path / "packed", config.model, "main", "cpu")
    total, tokens = 0.0, 0
    for example in spliced.examples():
        (ids_L,) = example.tokens_BL
        ends = [*(torch.nonzero(ids_L == 257).flatten() + 1).tolist(), len(ids_L)]
        for start, end in itertools.pairwise([0, *dict.fromkeys(ends)]):
            piece = ids_L[None, start:end]
            if end - start > 1:
                total += float(spliced.model(piece, labels=piece).loss) * (end - start - 1)
                tokens += end - start - 1
    figures = scores(spliced, coder())
    assert figures.tokens == tokens > 0
    assert figures.ce_clean == pytest.approx(total / tokens, rel=1e-4)


def test_nothing_to_predict_is_no_figure(spliced_model: tuple[Path, SplicedModel]) -> None:
    ids_BL = torch.zeros(1, 4, dtype=torch.int64)
    none_BL = torch.zeros(1, 4, dtype=torch.bool)
    predictions = [
        Prediction(
            tokens_BL=ids_BL,
            wanted_BL=ids_BL,
            counts_BL=none_BL,
            run=lambda new: torch.zeros(1, 4, 260),
        )
    ]
    with pytest.raises(ValueError, match="must have a token to predict"):
        measure_loss_recovered(coder(), predictions, Filters(norm_limits={}))
