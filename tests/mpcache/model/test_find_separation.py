"""Separated documents have the same values as alone, in every family of models."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, MistralConfig, PreTrainedModel

from mpcache.collection.producer import empty_rows
from mpcache.config import CollectConfig
from mpcache.data.special_tokens import SpecialTokens
from mpcache.model.capture_part import capture_part
from mpcache.model.cut_batches import ForwardBatches
from mpcache.model.find_separation import _packed_faults, find_separation
from mpcache.model.hookpoint_patterns import Side, resolve_sides
from mpcache.model.hooks import Capture
from mpcache.model.inputs import model_inputs
from mpcache.model.separation_lengths import fit_to_context, longest_setting
from mpcache.model.separation_trial import SeparationTrial
from tests.helpers.families import FAMILIES, VOCABULARY, WINDOW, Family
from tests.helpers.models import tiny_model

CTX_LEN = 40
END = VOCABULARY - 1
SPECIALS = SpecialTokens(begin=None, begins="document", end=END)
LENGTHS = (13, 1, 20, 6, 2, 33, 5)  # two sequences: the last two documents fill the second
DTYPES = [torch.float32, torch.bfloat16]


def make_config(dtype: torch.dtype, **changes) -> CollectConfig:
    usual = {
        "model": "m", "dataset": "d", "hookpoints": ("layers.*",), "ctx_len": CTX_LEN,
        "part_rows": 2 * CTX_LEN, "chunk_rows": CTX_LEN, "batch_sequences": 2,
        "model_dtype": str(dtype).removeprefix("torch."), "cross_document_attention": False,
    }  # fmt: skip
    return CollectConfig(**(usual | changes))


def make_documents(lengths=LENGTHS) -> list[np.ndarray]:
    """Documents that end with the end token; a middle token of the first one is a padding token."""
    random = np.random.default_rng(0)
    documents = [random.integers(3, END, length).astype(np.uint16) for length in lengths]
    documents[0][4] = 1
    for document in documents:
        document[-1] = END
    return documents


def rows_of(
    model: PreTrainedModel, sides: tuple[Side, ...], documents: list[np.ndarray], config
) -> dict[Side, Tensor]:
    """The rows of the documents, as a part collected with `config`, in the order of tokens."""
    separation = find_separation(model, config, sides)
    tokens = np.concatenate(documents)
    starts = np.zeros(tokens.size, np.bool_)
    starts[np.cumsum([0, *map(len, documents)])[:-1]] = True
    fill = -tokens.size % config.ctx_len
    tokens_SL, starts_SL = (
        np.pad(a, (0, fill)).reshape(-1, config.ctx_len) for a in (tokens, starts)
    )
    reading = ForwardBatches(model, SPECIALS, separation, config.batch_sequences)
    if config.one_document_per_sequence:
        batches = reading.batches(tokens_SL, starts_SL, tokens.size)
    else:
        assert not fill
        batches = reading.batches(tokens_SL)
    counted: list[int] = []
    with Capture(model, sides) as capture:
        buffers = {
            side: empty_rows(tokens.size, width, torch.float32)
            for side, width in capture.widths.items()
        }
        capture_part(capture, batches, np.arange(tokens.size), buffers, counted.append)
    assert sum(counted) == tokens.size
    return buffers


def rows_alone(
    model: PreTrainedModel, sides: tuple[Side, ...], documents: list[np.ndarray]
) -> dict[Side, Tensor]:
    """A slow reference: each document in a separate forward pass, without our inputs."""
    rows: dict[Side, list[Tensor]] = {side: [] for side in sides}
    with Capture(model, sides) as capture:
        for document in documents:
            ids = torch.from_numpy(document.astype(np.int64))[None]
            capture.run({"input_ids": ids}, lambda side, x: rows[side].append(x[0].float().clone()))
    return {side: torch.cat(values) for side, values in rows.items()}


def distance(x_RW: Tensor, y_RW: Tensor) -> float:
    return float((x_RW - y_RW).norm(dim=1).max() / y_RW.norm(dim=1).mean())


def check_rows(family: Family, dtype: torch.dtype, config: CollectConfig) -> None:
    """Check that rows equal those of each document alone, up to the rounding of the dtype.

    float32: a bound far below any effect of another document. bfloat16: as much as the dtype itself
    changes the document alone.
    """
    model = family.model(dtype)
    sides, documents = family.sides(model), make_documents()
    rows = rows_of(model, sides, documents, config)
    alone = rows_alone(model, sides, documents)
    exact = alone if dtype == torch.float32 else rows_alone(family.model(), sides, documents)
    for side in sides:
        bound = 1e-4 if dtype == torch.float32 else 2 * distance(alone[side], exact[side])
        assert distance(rows[side], alone[side]) <= bound, side


CASES = [
    pytest.param(
        family,
        dtype,
        id=f"{family}-{str(dtype).removeprefix('torch.')}",
        marks=[] if family.is_fast else [pytest.mark.slow],
    )
    for family in FAMILIES
    for dtype in DTYPES
]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_packed_documents_are_as_alone_or_refused(family: Family, dtype: torch.dtype) -> None:
    config, model = make_config(dtype), family.model(dtype)
    if family.packed in ("positions", "mask", "causal mask"):
        assert find_separation(model, config, family.sides(model)) == family.packed
        check_rows(family, dtype, config)
        return
    with pytest.raises(ValueError, match=r"use --one-document-per-sequence$") as error:
        find_separation(model, config, family.sides(model))
    assert f"({family.packed}) carries information between documents" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_lone_documents_are_as_alone(family: Family, dtype: torch.dtype) -> None:
    config, model = make_config(dtype, one_document_per_sequence=True), family.model(dtype)
    assert find_separation(model, config, family.sides(model)) == family.alone
    check_rows(family, dtype, config)


# --- what the trial detects ---


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "hookpoint", "separation"),
    [
        ("llama", "layers.*", "positions"),
        ("gpt2", "h.*", "positions"),
        ("neox", "layers.*", "positions"),
        ("bert", "encoder.layer.*", "mask"),
    ],
)
def test_both_kinds_of_attention(
    name: str, hookpoint: str, separation: str, attention: str
) -> None:
    model = tiny_model(name)
    model.set_attn_implementation(attention)
    config = make_config(torch.float32)
    sides, documents = resolve_sides([hookpoint], model), make_documents()
    assert find_separation(model, config, sides) == separation
    rows, alone = rows_of(model, sides, documents, config), rows_alone(model, sides, documents)
    together = rows_of(model, sides, documents, replace(config, cross_document_attention=True))
    for side in sides:
        assert distance(rows[side], alone[side]) < 1e-4
        assert distance(together[side], alone[side]) > 0.1


def test_asks_nothing_where_documents_may_mix() -> None:
    model = tiny_model()
    config = make_config(torch.float32, cross_document_attention=True)
    assert find_separation(model, config, resolve_sides(["layers.*"], model)) == "none"
    tokens_BL = np.array([[5, END, 6, 7]], np.uint16)
    assert list(model_inputs(tokens_BL, SPECIALS, "none", model)) == ["input_ids"]


def test_layers_above_the_sides_do_not_matter() -> None:
    """Rows of the layers below a recurrent layer are separate."""
    family = next(family for family in FAMILIES if family.name == "lfm2")
    kinds = {"layer_types": ["full_attention", "conv", "conv"]}
    model = replace(family, settings=family.settings | kinds).model()
    config = make_config(torch.float32)
    assert find_separation(model, config, resolve_sides(["layers.0"], model)) == "positions"
    with pytest.raises(
        ValueError, match=r"layers\.1\.conv \(Lfm2ShortConv\) carries information between documents"
    ):
        find_separation(model, config, resolve_sides(["layers.1"], model))


class Leak(nn.Module):
    """A layer's MLP that adds a little of a token some places before."""

    def __init__(self, mlp: nn.Module, share: float, distance: int) -> None:
        super().__init__()
        self.mlp, self.share, self.distance = mlp, share, distance

    def forward(self, x_BLD: Tensor) -> Tensor:
        leak_BLD = nn.functional.pad(x_BLD, (0, 0, self.distance, 0))[:, : x_BLD.shape[1]]
        return self.mlp(x_BLD) + self.share * leak_BLD


@pytest.mark.parametrize("distance", [1, 4, 60])
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
def test_a_leak_within_the_rounding_is_seen(
    dtype: torch.dtype, share: float, distance: int
) -> None:
    """A tolerance would let pass what changes a value by its last bit."""
    model = tiny_model().to(dtype)
    config = make_config(dtype, ctx_len=64, part_rows=640, chunk_rows=64)
    sides = resolve_sides(["layers.*"], model)
    assert find_separation(model, config, sides) == "positions"
    model.layers[1].mlp = Leak(model.layers[1].mlp, share, distance)
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp \(Leak\) carries information between documents"
    ):
        find_separation(model, config, sides)


def test_a_leak_over_a_long_chunk_is_seen() -> None:
    model = tiny_model(positions=128)
    config = make_config(torch.float32, ctx_len=128, part_rows=1280, chunk_rows=128)
    model.layers[1].mlp = Leak(model.layers[1].mlp, 1.0, distance=100)
    model.config.memory_chunk_size = 96
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp \(Leak\) carries information between documents"
    ):
        find_separation(model, config, resolve_sides(["layers.*"], model))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_that_a_mask_undoes_is_seen(dtype: torch.dtype) -> None:
    family = next(family for family in FAMILIES if family.name == "mistral")
    model = family.model(dtype)
    sides = family.sides(model)
    with Capture(model, sides) as capture:
        trial = SeparationTrial(model, capture, dtype)
        faults = [*_packed_faults(trial, "causal mask", CTX_LEN)]
        assert [fault.reason() for fault in faults] == [
            "the values of a document differ from those of the same document run alone"
        ]
        assert not [*_packed_faults(trial, "causal mask", WINDOW)], "no document exceeds the window"


@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_that_do_not_start_as_alone_are_seen(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = next(family for family in FAMILIES if family.name == "roberta")
    model = family.model(dtype)
    monkeypatch.setattr("mpcache.model.inputs.padding_index", lambda model: None)
    with pytest.raises(ValueError, match="RobertaModel cannot keep the documents of a sequence"):
        find_separation(model, make_config(dtype), family.sides(model))


class Capacity(nn.Module):
    """An MLP that serves the first tokens of a batch only."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x_BLD: Tensor) -> Tensor:
        tokens = x_BLD.shape[0] * x_BLD.shape[1]
        served = torch.arange(tokens).view(x_BLD.shape[:2]) <= 0.7 * tokens
        return self.mlp(x_BLD) * served[..., None]


@pytest.mark.parametrize("changes", [{}, {"one_document_per_sequence": True}])
def test_tokens_that_compete_within_a_batch_are_refused(changes: dict[str, bool]) -> None:
    model = tiny_model()
    model.layers[1].mlp = Capacity(model.layers[1].mlp)
    with pytest.raises(ValueError, match="differ from those of the same document run alone"):
        find_separation(
            model, make_config(torch.float32, **changes), resolve_sides(["layers.*"], model)
        )


@pytest.mark.parametrize("changes", [{}, {"one_document_per_sequence": True}])
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"expert_capacity": 64},
            r"limited number of tokens of a batch \(expert_capacity=64\); to let documents mix",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
             "max_position_embeddings": 32},
            "its dynamic rotary embedding changes .* beyond 32 tokens, .* 40; use --ctx-len 32$",
        ),
    ],
)  # fmt: skip
def test_what_depends_on_the_whole_batch_is_refused(
    settings: dict[str, object], reason: str, changes: dict[str, bool]
) -> None:
    model = tiny_model()
    for name, value in settings.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=reason) as error:
        find_separation(
            model, make_config(torch.float32, **changes), resolve_sides(["layers.*"], model)
        )
    assert "\n" not in str(error.value)


# --- lengths ---


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5), ctx_len=st.integers(1, 200))
def test_lengths_fit_a_sequence(lengths: list[int], ctx_len: int) -> None:
    fitted = fit_to_context(lengths, ctx_len)
    assert sum(fitted) <= ctx_len
    assert all(0 < a <= b for a, b in zip(fitted, lengths, strict=False))
    assert len(fitted) == min(len(lengths), ctx_len)
    assert sum(fitted) == min(sum(lengths), ctx_len) or len(fitted) < len(lengths)


@pytest.mark.parametrize(("ctx_len", "reach"), [(16, 64), (128, 64), (129, 128), (4096, 128)])
def test_documents_of_the_trial_exceed_a_window_that_matters(ctx_len: int, reach: int) -> None:
    assert longest_setting(MistralConfig(sliding_window=128), ["window"], ctx_len) == reach
    assert longest_setting(LlamaConfig(), ["window"], ctx_len) == 64


@pytest.mark.parametrize("ctx_len", [1, 2, 3, 8])
@pytest.mark.parametrize("lone", [False, True])
def test_short_sequences_have_a_trial_too(ctx_len: int, lone: bool) -> None:
    for name, hookpoint in (("llama", "layers.*"), ("bert", "encoder.layer.*")):
        model = tiny_model(name)
        config = make_config(
            torch.float32, ctx_len=ctx_len, part_rows=ctx_len, chunk_rows=ctx_len,
            one_document_per_sequence=lone,
        )  # fmt: skip
        assert find_separation(model, config, resolve_sides([hookpoint], model)) != "none"
