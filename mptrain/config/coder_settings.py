"""Options of coders, in the groups that `--help` and experiment files show."""

from dataclasses import dataclass
from typing import ClassVar, Literal

Optimizer = Literal["adam", "muon", "signsgd"]
Schedule = Literal["linear", "cosine", "constant"]
Start = Literal["mean", "median"]
Backend = Literal["auto", "direct", "gram", "shortlist"]
ScoreDtype = Literal["float32", "bfloat16"]
Codes = Literal["mp", "gp", "omp"]
Select = Literal["positive", "signed", "magnitude"]
Subtract = Literal["selecting", "separate", "predicting"]
Blocks = Literal["none", "selecting", "predicting", "both"]
BeginAs = Literal["mp", "topk", "groupmax"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How the weights of a coder are updated."""

    group: ClassVar[str] = "Optimizer"

    optimizer: Optimizer | None = None
    (
        "adam: Adam for all; muon: Muon for matrices and Adam for vectors; signsgd: schedule-free "
        "sign SGD for all; default: adam for saes, muon for transcoders"
    )
    warmup_share: float | None = None
    (
        "fraction (0 to 1) of the train steps, at the start, in which the learning rate rises "
        "linearly; default: 0.1 for adam, 0.02 for muon and signsgd"
    )
    schedule: Schedule | None = None
    (
        "how the learning rate changes after the warm-up; default: linear (to 0); for signsgd: "
        "constant, because signsgd averages the weights"
    )
    decay_share: float = 1.0
    "fraction (0 to 1) of the train steps, at the end, in which the learning rate falls"
    clip_norm: float | None = None
    (
        "scale a coder's gradients down if their norm over all its parameters exceeds this value; "
        "default: no clipping"
    )
    micro_batch_rows: int | None = None
    (
        "rows processed at once, to save memory; batch-mp and batch-topk then choose latents "
        "within each micro-batch; default: the whole batch"
    )
    start: Start = "mean"
    (
        "initial biases: the mean of all train rows, or the geometric median of 16384 train rows "
        "that no filter (such as --skip-positions) excludes"
    )
    normalise: bool = True
    "scale rows to one variance for training; the saved coder takes unscaled rows"


@dataclass(frozen=True, kw_only=True)
class CodeSettings:
    """How a coder computes the code of a row."""

    group: ClassVar[str] = "Coder"

    codes: Codes = "mp"
    (
        "arch mp only: values of the chosen latents: as set in each step (mp), or refitted in "
        "each step by gradient (gp) or least squares (omp)"
    )
    backend: Backend = "auto"
    (
        "arch mp, batch-mp only: how the latent of each step is found; direct and gram are exact, "
        "shortlist is approximate; auto: gram or direct, by the size of coder and batch"
    )
    shortlist_size: int = 64
    (
        "--backend shortlist only: number of best latents of each row; between two full searches, "
        "only these are searched"
    )
    shortlist_refresh: int = 4
    "--backend shortlist only: pursuit steps from one full search to the next"
    score_dtype: ScoreDtype = "float32"
    "dtype of the scores by which latents are chosen; values and gradients stay in float32"
    tolerance: float = 0.0
    (
        "arch mp, batch-mp only: stop the pursuit of a row when the norm of its residual is at "
        "most this fraction (0 to 1) of the initial norm"
    )
    shrink: float = 0.0
    (
        "arch mp, batch-mp only: soft threshold; each step's value is lowered by this, and a "
        "pursuit stops when no value stays positive"
    )
    select: Select = "positive"
    (
        "arch mp, batch-mp only: correlation that a step takes; positive: the largest, if it is "
        "positive; signed: the largest, even if it is negative; magnitude: the largest absolute "
        "value"
    )
    subtract: Subtract = "selecting"
    (
        "arch mp, batch-mp only: what a pursuit step subtracts from the residual: the latent's "
        "encoder row (selecting), its decoder row (predicting), or its row of a third, learned "
        "dictionary (separate; transcoders only)"
    )
    blocks: Blocks = "none"
    (
        "arch mp only: give each pursuit step its own block of latents; selecting: in the "
        "encoder; predicting: in the decoder; both: in both"
    )
    free_norm: bool = False
    (
        "arch mp, batch-mp only: allow dictionary rows of any norm instead of 1; a step can then "
        "enlarge the residual"
    )
    bias: bool = True
    "arch mp, batch-mp only: learn an input bias and an output bias"
    detach: bool = False
    "arch mp, batch-mp only: pass no gradient from a pursuit step to earlier steps"


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The terms of the loss."""

    group: ClassVar[str] = "Loss"

    per_step_loss: bool = False
    (
        "arch mp, batch-mp only: average the loss over the predictions after each pursuit step, "
        "instead of taking only the loss of the last prediction"
    )
    nested: bool = False
    "average the loss over predictions from the first 1/16, 1/4, 1/2 and all latents (Matryoshka)"
    multi_topk: bool = False
    "arch mp, topk only: add 1/8 of the loss of a second code with 4 x K latents per row"
    input_loss: float = 0.0
    (
        "transcoders of arch mp, batch-mp only: weight of an additional loss, the fraction of "
        "the input's variance that the pursuit leaves unexplained"
    )
    sparsity_weight: float = 0.01
    (
        "weight of the sparsity penalty; relu, gated: L1 in units of the target's standard "
        "deviation; jumprelu: L0"
    )
    bandwidth: float = 0.03
    (
        "arch jumprelu only: a threshold gets gradients from values in an interval of this width "
        "around it; also the initial threshold"
    )
    auxk_alpha: float = 0.125
    (
        "weight of the auxiliary loss that revives dead latents; 0: off; no effect on relu, "
        "jumprelu, gated"
    )
    dead_rows: int | None = None
    (
        "a latent counts as dead if it was not active in this many rows in succession; default: "
        "1/64 of the rows of the run, at least 4 batches; rows that filters leave out do not count"
    )


@dataclass(frozen=True, kw_only=True)
class CurriculumSettings:
    """What a coder trains as before it trains as itself."""

    group: ClassVar[str] = "Coder"

    begin_as: BeginAs = "mp"
    (
        "arch mp only: train at first as topk or groupmax (the largest latent of each of K groups) "
        "with the same dictionaries, then switch to mp; mp: no switch"
    )
    begin_share: float = 0.0
    "arch mp only: fraction (0 to 1) of the train steps before the switch of --begin-as"
    k_factor: float = 1.0
    "start the training with K multiplied by this number; needs --k-decay-share"
    k_decay_share: float = 0.0
    "fraction (0 to 1) of the train steps over which K falls linearly from --k-factor x K to K"


# fields are listed, also in the names of coders, in the order of these classes from the last one
@dataclass(frozen=True, kw_only=True)
class CoderSettings(CurriculumSettings, LossSettings, CodeSettings, OptimizerSettings):
    """Options that all coders of a run share, as far as they apply to their architecture."""
