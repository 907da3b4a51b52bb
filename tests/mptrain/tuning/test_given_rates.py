"""A best rate at the edge of a list is named; one with a worse rate on each side is not."""

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from mptrain.config.coder import CoderConfig
from mptrain.runs.results import CoderResult
from mptrain.tuning.given_rates import edge_warnings

SIDE = ("layers.3:output",)
CODER = CoderConfig(inputs=SIDE, targets=SIDE, kind="sae", arch="topk", k=4, expansion=2)


def warnings(fvus: dict[float, float | None]) -> list[str]:
    """The warnings about coders with these rates and FVUs; None: the coder diverged."""
    coders = [replace(CODER, lr=lr) for lr in fvus]
    results = [
        SimpleNamespace(
            coder=coder.name, validation=None if fvu is None else SimpleNamespace(fvu=fvu)
        )
        for coder, fvu in zip(coders, fvus.values(), strict=True)
    ]
    return list(edge_warnings(coders, cast(list[CoderResult], results)))


@pytest.mark.parametrize(
    ("fvus", "expected"),
    [
        ({0.1: 0.5, 0.2: 0.4, 0.4: 0.6}, None),
        ({0.4: 0.6, 0.1: 0.5, 0.2: 0.4}, None),
        ({0.1: 0.3, 0.2: 0.4}, "0.1, is the lowest that was given, and a lower lr"),
        ({0.1: 0.5, 0.2: 0.4, 0.4: 0.3}, "0.4, is the highest that was given, and a higher lr"),
        ({0.1: 0.5, 0.2: 0.4, 0.4: None}, None),
        ({0.1: None, 0.2: None}, None),
        ({0.1: 0.5}, None),
    ],
)
def test_an_edge_is_named(fvus: dict[float, float | None], expected: str | None) -> None:
    found = warnings(fvus)
    assert len(found) == (expected is not None)
    if expected is not None:
        assert f"best lr of layers.3-sae-topk-k4-x2-seed0, {expected}" in found[0]


def test_coders_without_a_given_rate_have_no_edge() -> None:
    assert not list(
        edge_warnings(
            [CODER], [cast(CoderResult, SimpleNamespace(coder=CODER.name, validation=None))]
        )
    )
