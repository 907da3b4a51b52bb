"""Memory of coders: bytes held between train steps are counted, bytes within one are estimated.

B rows in a batch, D input width, E target width, M latents, K code entries a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpcache.errors import UsageError
from mptrain.coders.coder import Coder
from mptrain.coders.encoders.pursuit import PursuitEncoder
from mptrain.config.coder import CoderConfig
from mptrain.config.coder_settings import Optimizer
from mptrain.pursuit.backend import microbatch_rows, resolve_backend
from mptrain.pursuit.refit import refit_rows
from mptrain.training.distributed import SINGLE_PROCESS, ProcessGroup
from mptrain.training.objective import WIDE

# tensors that an optimizer keeps per parameter, each of its size: for a matrix, for a vector
MOMENTS: dict[Optimizer, tuple[int, int]] = {"adam": (2, 2), "muon": (1, 2), "signsgd": (2, 2)}

_FLOAT, _COUNTER = 4, 8
# bytes of a code entry while its gradients are summed: index, value, both sorted, order, gradients
_ENTRY = 60
_ROW_COPIES = 6  # of inputs and targets in float32: centred, residuals, predictions, gradients


@dataclass(frozen=True, kw_only=True)
class CoderMemory:
    """Bytes of one coder on the device where it is trained."""

    name: str
    latents: int
    parameters: int
    "number of trained values"
    weights_bytes: int
    optimizer_bytes: int
    "moments, and the counter of each latent"
    step_bytes: int
    "peak of a train step beyond the bytes that are held; an estimate"

    @property
    def held_bytes(self) -> int:
        return self.weights_bytes + self.optimizer_bytes


def coder_memory(
    config: CoderConfig, input_width: int, target_width: int, rows: int, device: torch.device
) -> CoderMemory:
    """Return the memory that a coder needs to train on batches of `rows` rows.

    Raises:
        UsageError: there is no such coder for these widths.
    """
    with torch.device("meta"):  # shapes alone, no memory
        coder = Coder(config, input_width, target_width)
    trained = [p for p in coder.parameters() if p.requires_grad]
    matrix, vector = MOMENTS[config.resolved_optimizer]
    moments = sum(p.numel() * (matrix if p.ndim == 2 else vector) for p in trained)
    tensors = [*coder.parameters(), *coder.buffers()]
    return CoderMemory(
        name=config.name,
        latents=coder.latents,
        parameters=sum(p.numel() for p in trained),
        weights_bytes=_FLOAT * sum(t.numel() for t in tensors),
        optimizer_bytes=_FLOAT * moments + _COUNTER * coder.latents,
        step_bytes=_step_bytes(coder, input_width, target_width, rows, device),
    )


def pass_bytes(coders: Sequence[CoderMemory]) -> int:
    """Return the peak memory of a pass: all coders are held, and take their steps in turn."""
    return sum(coder.held_bytes for coder in coders) + max(coder.step_bytes for coder in coders)


def group_into_passes(
    coders: Sequence[CoderMemory],
    max_bytes: int | None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> list[list[str]]:
    """Return the names of the coders of each pass, in the given order.

    Each process has `max_bytes` for the coders that it trains; None: all coders in one pass.

    Raises:
        UsageError: a coder does not fit alone.
    """
    passes: list[list[CoderMemory]] = []
    for coder in coders:
        if max_bytes is not None and pass_bytes([coder]) > max_bytes:
            raise UsageError(
                f"max_memory must hold at least one coder, got {max_bytes} bytes, but {coder.name} "
                f"needs {pass_bytes([coder])}: {coder.weights_bytes} for weights, "
                f"{coder.optimizer_bytes} for the optimizer, {coder.step_bytes} for a train step "
                "(estimated); use a larger --max-memory, fewer latents, or a smaller --batch-rows "
                "or --micro-batch-rows"
            )
        if passes and (max_bytes is None or _fits([*passes[-1], coder], max_bytes, processes)):
            passes[-1].append(coder)
        else:
            passes.append([coder])
    return [[coder.name for coder in coders] for coders in passes]


def _fits(coders: Sequence[CoderMemory], max_bytes: int, processes: ProcessGroup) -> bool:
    shares = processes.coders_per_process(coders)
    return all(pass_bytes(share) <= max_bytes for share in shares if share)


def _step_bytes(coder: Coder, D: int, E: int, rows: int, device: torch.device) -> int:
    """Gradients, the rows in work with their codes and scores, and the optimizer's work memory."""
    config, M = coder.config, coder.latents
    B = min(rows, config.micro_batch_rows or rows)
    sizes = [p.numel() for p in coder.parameters() if p.requires_grad]
    gradients = _FLOAT * sum(sizes)
    whole_batch = (
        _FLOAT * rows * (2 * E + (D if config.kind == "sae" else D + E))
    )  # filtered, centred
    in_work = _FLOAT * _ROW_COPIES * B * (D + E)
    codes = _ENTRY * B * _entries(config, M, D)
    scores = _scores(coder, B, device) + _refit(coder, D, device)
    return gradients + whole_batch + in_work + codes + scores + _update(coder)


def _entries(config: CoderConfig, M: int, D: int) -> int:
    """Most code entries that a row has at once, including those of dead latents."""
    if config.k is None:
        return M
    own = math.ceil(config.k_factor * config.k)  # at the beginning
    own *= config.architecture.entries
    wide = WIDE * config.k if config.multi_topk else 0
    dead = D // 2 if config.auxk_alpha else 0
    return min(own, M) + min(wide, M) + min(dead, M)


def _scores(coder: Coder, B: int, device: torch.device) -> int:
    config, M = coder.config, coder.latents
    scored_rows = min(B, microbatch_rows(M, device))
    scores = 2 * _FLOAT * scored_rows * M
    if not config.architecture.is_pursuit or config.codes != "mp":
        return scores
    assert isinstance(coder.encoder, PursuitEncoder)
    backend = resolve_backend(
        coder.encoder.search, M, B * config.required_k, config.blocks != "none"
    )
    return scores + (_FLOAT * M**2 if backend == "gram" else 0)


def _refit(coder: Coder, D: int, device: torch.device) -> int:
    """Atoms of a micro-batch, their products, and what autograd keeps for the backward pass."""
    config = coder.config
    if not config.architecture.is_pursuit or config.codes == "mp":
        return 0
    k = config.required_k * config.architecture.entries
    rows = refit_rows(coder.latents, D, k, device)
    steps = k if config.codes == "gp" else 2  # gp's fit is a chain of K steps, omp's in float64
    return _FLOAT * rows * k * (4 * D + (3 + steps) * k) + _FLOAT * coder.latents * D


def _update(coder: Coder) -> int:
    """Muon works on one matrix at a time: the update, and three copies in bfloat16."""
    matrices = [p.numel() for p in coder.parameters() if p.requires_grad and p.ndim == 2]
    return 10 * max(matrices, default=0) if coder.config.resolved_optimizer == "muon" else 0
