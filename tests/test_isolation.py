"""Documents that are kept apart have the values that each has alone, in every family of models."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from families import FAMILIES, VOCABULARY, Family
from mpcache.config import CollectConfig
from mpcache.forward import Reading, capture_part
from mpcache.hooks import Capture, Side
from mpcache.isolation import find_separation
from mpcache.station import empty_rows
from mpcache.tokens import Specials

CTX_LEN = 40
END = VOCABULARY - 1
SPECIALS = Specials(begin=None, begins="document", end=END)
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
    reading = Reading(model, SPECIALS, separation, config.batch_sequences)
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
    """A slow reference: each document by itself in a pass of its own, without any of our inputs."""
    rows: dict[Side, list[Tensor]] = {side: [] for side in sides}
    with Capture(model, sides) as capture:
        for document in documents:
            ids = torch.from_numpy(document.astype(np.int64))[None]
            capture.run({"input_ids": ids}, lambda side, x: rows[side].append(x[0].float().clone()))
    return {side: torch.cat(values) for side, values in rows.items()}


def distance(x_RW: Tensor, y_RW: Tensor) -> float:
    return float((x_RW - y_RW).norm(dim=1).max() / y_RW.norm(dim=1).mean())


def check_rows(family: Family, dtype: torch.dtype, config: CollectConfig) -> None:
    """Rows are those of each document alone, up to the rounding of the dtype.

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
    assert f"({family.packed}) lets it flow" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_lone_documents_are_as_alone(family: Family, dtype: torch.dtype) -> None:
    config, model = make_config(dtype, one_document_per_sequence=True), family.model(dtype)
    assert find_separation(model, config, family.sides(model)) == family.alone
    check_rows(family, dtype, config)
