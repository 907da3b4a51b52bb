"""Filters of rows at read time: by position, by token, and by the norms of a coder's own sides.

B rows in a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mpcache.errors import UsageError
from mptrain.config.run import OnlyTokens, RunConfig
from mptrain.config.sides import Side, parse_side
from mptrain.data.columns import ASSISTANT, TOKEN, RowField, norm_of
from mptrain.data.loader import Batch, Store, check_assistant_known


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which rows a coder trains on. They do not depend on the other coders of the run."""

    skip_positions: int = 0
    skip_tokens: tuple[int, ...] = ()
    norm_limits: Mapping[Side, float]
    "largest norm of a row that is kept, by side; other sides have no limit"
    allow_nonfinite: bool = False
    "whether the store may hold rows with non-finite values, which are then left out"
    only_tokens: OnlyTokens = "all"
    "rows to keep: of all tokens, or of those that an assistant wrote"

    @property
    def row_fields(self) -> tuple[RowField, ...]:
        """Row fields that the filters need from a loader."""
        tokens = (TOKEN,) if self.skip_tokens else ()
        assistant = (ASSISTANT,) if self.only_tokens == "assistant" else ()
        return (*tokens, *assistant, *map(norm_of, self.norm_limits))

    def usable(self, batch: Batch, sides: Sequence[Side]) -> Bool[Tensor, " B"]:
        """Return which rows can be coded at all: those that are finite on the given sides."""
        usable_B = torch.ones_like(batch.positions_B, dtype=torch.bool)
        for side in set(sides) if self.allow_nonfinite else ():
            usable_B &= batch.values[side].isfinite().all(dim=1)
        return usable_B

    def kept(self, batch: Batch, sides: Sequence[Side]) -> Bool[Tensor, " B"]:
        """Return which rows a coder of these sides trains on."""
        norms = {side: batch.fields[norm_of(side)] for side in self.of(sides).norm_limits}
        tokens, assistant = batch.fields.get(TOKEN), batch.fields.get(ASSISTANT)
        kept_B = self.of(sides).passed(batch.positions_B, tokens, norms, assistant)
        return kept_B & self.usable(batch, sides)

    def passed(
        self,
        positions: Tensor,
        tokens: Tensor | None,
        norms: Mapping[Side, Tensor],
        assistant: Tensor | None = None,
    ) -> Tensor:
        """Return which rows pass; positions, tokens and norms have the same shape, whatever it is.

        Tokens are needed where some are skipped. `assistant` says whether an assistant wrote the
        token; it is needed where only such tokens are kept.
        """
        passed = positions >= self.skip_positions
        if self.skip_tokens:
            assert tokens is not None
            passed = passed & ~torch.isin(tokens, torch.tensor(self.skip_tokens).to(tokens))
        if self.only_tokens == "assistant":
            assert assistant is not None
            passed = passed & (assistant != 0)
        for side, limit in self.norm_limits.items():
            passed = passed & (norms[side] <= limit)
        return passed

    def of(self, sides: Sequence[Side]) -> "Filters":
        """Return the filters of a coder of these sides."""
        return replace(self, norm_limits={s: n for s, n in self.norm_limits.items() if s in sides})

    def as_json(self) -> dict[str, Any]:
        """Return plain values, from which `filters_from_json` makes equal filters."""
        limits = {":".join(side): limit for side, limit in self.norm_limits.items()}
        return {**asdict(replace(self, norm_limits={})), "norm_limits": limits}


def filters_from_json(trained: Mapping[str, Any]) -> Filters:
    """Return the filters that a coder was trained with; `trained` is from its `coder.json`."""
    limits = trained.get("norm_limits", {})  # coders of earlier versions lack some of these
    return Filters(
        skip_positions=trained["skip_positions"],
        skip_tokens=tuple(trained.get("skip_tokens", ())),
        norm_limits={parse_side(name): limit for name, limit in limits.items()},
        allow_nonfinite=trained["allow_nonfinite"],
        only_tokens=trained.get("only_tokens", "all"),
    )


def make_filters(config: RunConfig, store: Store, sides: Sequence[Side]) -> Filters:
    """Return the filters of a run.

    Raises:
        UsageError: the store does not record what a filter needs, or has no such token.
    """
    if config.only_tokens == "assistant":
        check_assistant_known(store)
    limits = {}
    if config.max_norm is not None:
        limits = {side: config.max_norm * median_norm(store, side) for side in sides}
    return Filters(
        skip_positions=config.skip_positions,
        skip_tokens=_token_ids(config.skip_tokens, store),
        norm_limits=limits,
        allow_nonfinite=config.allow_nonfinite,
        only_tokens=config.only_tokens,
    )


def median_norm(store: Store, side: Side) -> float:
    """Return the median norm of the finite rows of the first train part.

    The first part alone, so that the median stays the same when the store grows.
    """
    norms = store.acts.read_norms(*side, store.parts([side], "train")[0].number)
    return float(norms[norms.isfinite()].median())


def _token_ids(skip_tokens: Sequence[str], store: Store) -> tuple[int, ...]:
    ids = {int(token) for token in skip_tokens if token != "special"}
    if ids and max(ids) > store.largest_token_id:
        raise UsageError(
            f"skip_tokens must be token ids of {store.storage}, at most {store.largest_token_id}, "
            f"got {max(ids)}; remove that id from --skip-tokens"
        )
    if "special" in skip_tokens:
        if store.special_ids is None:
            raise UsageError(
                f"{store.storage} does not record which tokens are special, because an earlier "
                "mpcache version wrote it; give their token ids to --skip-tokens instead of the "
                "word special"
            )
        ids |= set(store.special_ids)
    return tuple(sorted(ids))
