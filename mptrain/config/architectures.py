"""The table of architectures: what each is called, which options it takes, and what it needs.

An architecture is complete with an entry here and a module `mptrain/coders/encoders/<encoder>.py`.
"""

from dataclasses import dataclass
from typing import Literal

Arch = Literal["mp", "batch-mp", "topk", "batch-topk", "groupmax", "relu", "jumprelu", "gated"]
Encoder = Literal["pursuit", "topk", "relu", "jumprelu", "gated"]

_PURSUIT = frozenset(
    {
        "backend", "shortlist_size", "shortlist_refresh", "tolerance", "shrink", "select",
        "subtract",
        "free_norm", "bias", "detach", "per_step_loss", "input_loss",
    }
)  # fmt: skip
_K_SCHEDULE = frozenset({"k_factor", "k_decay_share"})
_LATENT_CHOICE = frozenset({"auxk_alpha", "score_dtype"})  # where K latents are chosen


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One row of the table."""

    label: str
    "its name in figures"
    color: str
    "its color in figures"
    encoder: Encoder
    "module of `mptrain.coders.encoders`"
    options: frozenset[str]
    "options that apply to it, of those that do not apply to every architecture"
    needs_k: bool = True
    "K says how many latents a row has; otherwise a loss makes codes sparse"
    has_threshold: bool = False
    "a threshold keeps K latents a row on average, instead of K in each row"
    entries: int = 1
    "entries of a code that are computed, as a multiple of K, before the threshold drops some"

    @property
    def is_pursuit(self) -> bool:
        """Whether a matching pursuit computes its codes."""
        return self.encoder == "pursuit"


ARCHITECTURES: dict[Arch, Architecture] = {
    "mp": Architecture(
        label="matching pursuit (MP)",
        color="#c8202f",
        encoder="pursuit",
        options=_PURSUIT
        | _LATENT_CHOICE
        | _K_SCHEDULE
        | {"codes", "blocks", "begin_as", "begin_share", "multi_topk"},
    ),
    "batch-mp": Architecture(
        label="batch MP",
        color="#d98b1e",
        encoder="pursuit",
        options=_PURSUIT | _LATENT_CHOICE | _K_SCHEDULE,
        has_threshold=True,
        entries=2,
    ),
    "topk": Architecture(
        label="plain (TopK)",
        color="#1f5fa8",
        encoder="topk",
        options=_LATENT_CHOICE | _K_SCHEDULE | {"multi_topk"},
    ),
    "batch-topk": Architecture(
        label="BatchTopK",
        color="#3a9d8f",
        encoder="topk",
        options=_LATENT_CHOICE | _K_SCHEDULE,
        has_threshold=True,
        entries=4,
    ),
    "groupmax": Architecture(
        label="GroupMax", color="#7a5195", encoder="topk", options=_LATENT_CHOICE
    ),
    "relu": Architecture(
        label="ReLU with L1",
        color="#5b6770",
        encoder="relu",
        options=frozenset({"sparsity_weight"}),
        needs_k=False,
    ),
    "jumprelu": Architecture(
        label="JumpReLU",
        color="#a8569c",
        encoder="jumprelu",
        options=frozenset({"sparsity_weight", "bandwidth"}),
        needs_k=False,
    ),
    "gated": Architecture(
        label="gated",
        color="#8c6d31",
        encoder="gated",
        options=frozenset({"sparsity_weight"}),
        needs_k=False,
    ),
}

_RESTRICTED = frozenset[str]().union(*(a.options for a in ARCHITECTURES.values()))


def architectures_with(option: str) -> tuple[Arch, ...]:
    """The architectures that an option applies to."""
    return tuple(
        name
        for name, architecture in ARCHITECTURES.items()
        if option not in _RESTRICTED or option in architecture.options
    )
