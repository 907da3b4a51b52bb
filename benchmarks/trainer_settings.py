"""The trainings that compare our trainer with those of other tools."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mpcache.errors import UsageError
from mptrain.config.architectures import Arch
from mptrain.config.coder_grid import FitConfig
from mptrain.config.sides import Kind

Tool = Literal["mptrain", "sae-lens", "eai-sparsify"]
TrainedArch = Literal["mp", "topk", "batch-topk", "matryoshka", "jumprelu"]

OUR_ARCHS: dict[TrainedArch, Arch] = {
    "mp": "mp",
    "topk": "topk",
    "batch-topk": "batch-topk",
    "matryoshka": "batch-topk",
    "jumprelu": "jumprelu",
}
"our architecture for each; matryoshka is batch-topk with a nested loss"
DEFAULT_SPARSITY: dict[Tool, float] = {"mptrain": FitConfig.sparsity_weight, "sae-lens": 1.0}
"weight of the L0 penalty of JumpReLU in each tool"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One training: a coder of a tool, at a rate."""

    tool: Tool
    arch: TrainedArch
    kind: Kind = "sae"
    hookpoint: str = "layers.3"
    latents: int = 1024
    k: int = 16
    "latents of a row; of jumprelu, the L0 that its penalty is set for"
    normalise: bool = False
    "scale rows to a mean square of about 1, by the tool's own option for that"
    batch_rows: int = 256
    steps: int = 1000
    seed: int = 0
    lr: float | None = None
    "peak rate; None: the default of the tool"
    sparsity: float | None = None
    "weight of the penalty of jumprelu; None for other architectures"

    @property
    def coder(self) -> str:
        """A short name of what is trained, by which commands choose."""
        return f"{self.tool} {self.arch} {self.kind}{' normalised' if self.normalise else ''}"


def coders() -> Iterator[Setting]:
    """Each coder that is compared, at its tool's default rate, in runs of 1000 steps.

    Ours take scaled rows, as by default. SAELens' JumpReLU takes them too, because its bandwidth
    is for such rows, and its TopK once more, to show what scaling does there.
    """
    transcoder: dict[str, Any] = {"kind": "skip-transcoder", "hookpoint": "layers.3.mlp"}
    ours = Setting(tool="mptrain", arch="mp", normalise=True)
    yield ours
    yield replace(ours, arch="topk")
    yield Setting(tool="eai-sparsify", arch="topk")
    yield Setting(tool="sae-lens", arch="topk")
    yield Setting(tool="sae-lens", arch="topk", normalise=True)
    yield replace(ours, **transcoder)
    yield replace(ours, arch="topk", **transcoder)
    yield Setting(tool="eai-sparsify", arch="topk", **transcoder)
    for arch in ("batch-topk", "matryoshka"):
        yield replace(ours, arch=arch)
        yield Setting(tool="sae-lens", arch=arch)
    yield Setting(tool="sae-lens", arch="mp")
    yield replace(ours, arch="jumprelu")
    yield Setting(tool="sae-lens", arch="jumprelu", normalise=True)


def chosen(settings: Sequence[Setting], words: Sequence[str]) -> list[Setting]:
    """The settings of the tools, architectures and kinds that are named; all where none is.

    Raises:
        UsageError: a word names none of them.
    """
    names = {field: {getattr(s, field) for s in settings} for field in ("tool", "arch", "kind")}
    known = set[str]().union(*names.values())
    for word in words:
        if word not in known:
            raise UsageError(f"only must be one of {', '.join(sorted(known))}, got {word!r}")
    wanted = {field: own & set(words) or own for field, own in names.items()}
    return [s for s in settings if all(getattr(s, f) in own for f, own in wanted.items())]


def in_long_run(setting: Setting) -> Setting:
    """The setting in a run of a usual length, 12 000 steps, of fewer rows each.

    These are 1 344 000 rows, one pass over the train rows of the demo's store.
    """
    return replace(setting, steps=12_000, batch_rows=112, seed=0)


def fit_config(setting: Setting, store: str | Path, run: str | Path) -> FitConfig:
    """A run of ours of the setting; the rows and the filters of all tools are those of this run."""
    return FitConfig(
        store=str(store),
        run=str(run),
        hookpoints=(setting.hookpoint,),
        kind=(setting.kind,),
        arch=(OUR_ARCHS[setting.arch],),
        k=(FitConfig.k[0] if setting.arch == "jumprelu" else setting.k,),
        latents=(setting.latents,),
        seed=(setting.seed,),
        lr=("auto" if setting.lr is None else setting.lr,),
        nested=setting.arch == "matryoshka",
        normalise=setting.normalise,
        rows=setting.steps * setting.batch_rows,
        batch_rows=setting.batch_rows,
        eval_every=setting.steps,
        eval_rows=1024,
        device="cpu",
        sparsity_weight=setting.sparsity or DEFAULT_SPARSITY["mptrain"],
    )
