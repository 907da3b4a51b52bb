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

    optimizer: Optimizer = "muon"
    "muon: for matrices, with Adam for vectors; adam: for all; signsgd: for all, schedule-free"
    warmup_share: float = 0.02
    "share of the train steps in which the learning rate rises linearly"
    schedule: Schedule | None = None
    "how the learning rate falls to 0; default: linear, but constant for signsgd, which averages"
    decay_share: float = 1.0
    "share of the train steps, at their end, in which the learning rate falls"
    clip_norm: float | None = None
    "scale gradients down to this norm, taken over all parameters; default: no clipping"
    micro_batch_rows: int | None = None
    "rows coded at once; their gradients add up (batch- selects in each); default: the whole batch"
    start: Start = "mean"
    "biases start at the mean of all train rows, or at the geometric median of 16384 filtered ones"
    normalise: bool = False
    "train on rows scaled to a mean square of about 1; the saved coder takes unscaled rows"


@dataclass(frozen=True, kw_only=True)
class CodeSettings:
    """How a coder computes the code of a row."""

    group: ClassVar[str] = "Coder"

    codes: Codes = "mp"
    "values of an mp code: as steps leave them, or refitted by gradient (gp) or exactly (omp)"
    backend: Backend = "auto"
    "how mp finds atoms: direct, gram (both exact) or shortlist; auto: gram or direct, by size"
    shortlist_size: int = 64
    "shortlist: best atoms of a row that are searched between two full searches"
    shortlist_refresh: int = 4
    "shortlist: pursuit steps from one full search to the next"
    score_dtype: ScoreDtype = "float32"
    "dtype of the products that choose latents; values and gradients are float32"
    tolerance: float = 0.0
    "mp: stop a row when its residual norm is at most this share of its first norm"
    shrink: float = 0.0
    "mp: soft threshold; a step's value is lowered by this, and a row stops where none is left"
    select: Select = "positive"
    "mp: largest correlation, if positive; signed: largest, any sign; magnitude: largest absolute"
    subtract: Subtract = "selecting"
    "mp: rows to subtract: the selecting ones, a separate dictionary (transcoder), or the decoder's"
    blocks: Blocks = "none"
    "mp: a block of latents for each step, of the selecting rows, of the decoder's, or of both"
    free_norm: bool = False
    "mp: dictionaries of any norm; a step can then enlarge the residual"
    bias: bool = True
    "mp: an input and an output bias"
    detach: bool = False
    "mp: no gradient from a pursuit step to the steps before it"


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The terms of the loss."""

    group: ClassVar[str] = "Loss"

    per_step_loss: bool = False
    "mp: average the loss over all prefixes of the pursuit instead of taking its end"
    nested: bool = False
    "average the loss over predictions by the first 1/16, 1/4, 1/2 and all latents (Matryoshka)"
    multi_topk: bool = False
    "add 1/8 of the loss with 4 K entries a row"
    input_loss: float = 0.0
    "mp transcoder: weight of the input's variance that its pursuit leaves unexplained"
    sparsity_weight: float = 0.01
    "weight of the L1 penalty in standard deviations (relu, gated), or of the L0 penalty (jumprelu)"
    bandwidth: float = 0.03
    "jumprelu: pre-activations this near to a threshold move it; also where thresholds start"
    auxk_alpha: float = 0.03125
    "weight of the auxiliary loss that revives dead latents; 0 turns it off"
    dead_rows: int = 1_000_000
    "a latent that did not fire for this many rows is dead"


@dataclass(frozen=True, kw_only=True)
class CurriculumSettings:
    """What a coder trains as before it trains as itself."""

    group: ClassVar[str] = "Coder"

    begin_as: BeginAs = "mp"
    "mp: train as topk or groupmax, with the same dictionaries, before the switch to mp"
    begin_share: float = 0.0
    "share of the train steps before that switch"
    k_factor: float = 1.0
    "training starts at this multiple of K"
    k_decay_share: float = 0.0
    "share of the train steps in which that multiple falls linearly to 1"


# fields are listed, also in the names of coders, in the order of these classes from the last one
@dataclass(frozen=True, kw_only=True)
class CoderSettings(CurriculumSettings, LossSettings, CodeSettings, OptimizerSettings):
    """Options that all coders of a run share, as far as they apply to their architecture."""
