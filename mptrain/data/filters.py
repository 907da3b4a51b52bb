"""Which rows a coder takes: filters at read time, by position, token and its own sides alone.

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
from mptrain.config.sides import Side
from mptrain.data.loader import Batch, Store, refuse_without_assistant
from mptrain.data.windows import ASSISTANT, TOKEN, RowField, norm_of


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What leaves a row out. A coder's are the same whatever is trained beside it."""

    skip_positions: int = 0
    skip_tokens: tuple[int, ...] = ()
    norm_limits: Mapping[Side, float]
    "largest norm of a row that is taken; none for a side that is not named"
    allow_nonfinite: bool = False
    "there may be rows with non-finite values, and they are left out"
    only_tokens: OnlyTokens = "all"
    "whose tokens' rows are taken"

    @property
    def facts(self) -> tuple[RowField, ...]:
        """What a loader has to tell of each row."""
        tokens = (TOKEN,) if self.skip_tokens else ()
        assistant = (ASSISTANT,) if self.only_tokens == "assistant" else ()
        return (*tokens, *assistant, *map(norm_of, self.norm_limits))

    def usable(self, batch: Batch, sides: Sequence[Side]) -> Bool[Tensor, " B"]:
        """Rows that can be coded at all: finite on the named sides."""
        usable_B = torch.ones_like(batch.positions_B, dtype=torch.bool)
        for side in set(sides) if self.allow_nonfinite else ():
            usable_B &= batch.values[side].isfinite().all(dim=1)
        return usable_B

    def kept(self, batch: Batch, sides: Sequence[Side]) -> Bool[Tensor, " B"]:
        """Rows that a coder of these sides takes."""
        norms = {side: batch.facts[norm_of(side)] for side in self.of(sides).norm_limits}
        tokens, assistant = batch.facts.get(TOKEN), batch.facts.get(ASSISTANT)
        kept_B = self.of(sides).passed(batch.positions_B, tokens, norms, assistant)
        return kept_B & self.usable(batch, sides)

    def passed(
        self,
        positions: Tensor,
        tokens: Tensor | None,
        norms: Mapping[Side, Tensor],
        assistant: Tensor | None = None,
    ) -> Tensor:
        """Which rows pass, given in any shape; tokens are needed where some are skipped.

        `assistant`, whether the assistant wrote the token, is needed where only such are taken.
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
        """Those of a coder of these sides."""
        return replace(self, norm_limits={s: n for s, n in self.norm_limits.items() if s in sides})

    def as_json(self) -> dict[str, Any]:
        """Plain values, from which `filters_from_json` makes the same filters again."""
        limits = {":".join(side): limit for side, limit in self.norm_limits.items()}
        return {**asdict(replace(self, norm_limits={})), "norm_limits": limits}


def filters_from_json(trained: Mapping[str, Any]) -> Filters:
    """The filters that a coder was trained with."""
    limits = trained.get("norm_limits", {})  # as tokens below: not in coders of earlier versions
    return Filters(
        skip_positions=trained["skip_positions"],
        skip_tokens=tuple(trained.get("skip_tokens", ())),
        norm_limits={_side(name): limit for name, limit in limits.items()},
        allow_nonfinite=trained["allow_nonfinite"],
        only_tokens=trained.get("only_tokens", "all"),
    )


def make_filters(config: RunConfig, store: Store, sides: Sequence[Side]) -> Filters:
    """The filters of a run. ValueError: the store does not know what a filter asks for."""
    if config.only_tokens == "assistant":
        refuse_without_assistant(store)
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
    """Of the finite rows of the first train part: the same however far the store has grown."""
    norms = store.acts.read_norms(*side, store.parts([side], "train")[0].number)
    return float(norms[norms.isfinite()].median())


def _token_ids(skip_tokens: Sequence[str], store: Store) -> tuple[int, ...]:
    ids = {int(token) for token in skip_tokens if token != "special"}
    if ids and max(ids) > store.largest_token_id:
        raise UsageError(
            f"skip_tokens must be token ids of {store.storage}, at most {store.largest_token_id}, "
            f"got {max(ids)}; leave that id out"
        )
    if "special" in skip_tokens:
        if store.special_ids is None:
            raise UsageError(
                f"{store.storage} does not tell which tokens are special: an earlier mpcache made "
                "it; name their ids in skip_tokens instead"
            )
        ids |= set(store.special_ids)
    return tuple(sorted(ids))


def _side(name: str) -> Side:
    hookpoint, _, side = name.rpartition(":")
    return hookpoint, side
