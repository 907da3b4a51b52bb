"""How much memory coders take: what is held is counted, what a train step works in is estimated.

B rows in a batch, D input width, E target width, M latents, K code entries a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpcache.errors import UsageError
from mptrain.coders.coder import Coder
from mptrain.coders.encoders.pursuit import PursuitEncoder
from mptrain.config.coder import CoderConfig, Optimizer
from mptrain.pursuit.backend import microbatch_rows, resolve
from mptrain.pursuit.refit import refit_rows
from mptrain.training.distributed import SINGLE_PROCESS, ProcessGroup
from mptrain.training.objective import WIDE

# tensors of a parameter's size that an optimizer keeps for it: of a matrix, of a vector
MOMENTS: dict[Optimizer, tuple[int, int]] = {"adam": (2, 2), "muon": (1, 2), "signsgd": (2, 2)}

_FLOAT, _COUNTER = 4, 8
# bytes of a code entry while its gradients are summed: index, value, both sorted, order, gradients
_ENTRY = 60
_ROW_COPIES = 6  # of inputs and targets in float32: centred, residuals, predictions, gradients


@dataclass(frozen=True, kw_only=True)
class CoderMemory:
    """Bytes of one coder on the device that it trains on."""

    name: str
    latents: int
    parameters: int
    "how many numbers are trained"
    weights_bytes: int
    optimizer_bytes: int
    "moments, and for how many rows each latent has not fired"
    step_bytes: int
    "most that a train step works in, beside what is held; an estimate"

    @property
    def held_bytes(self) -> int:
        return self.weights_bytes + self.optimizer_bytes


def coder_memory(
    config: CoderConfig, input_width: int, target_width: int, rows: int, device: torch.device
) -> CoderMemory:
    """What a coder needs to train on batches of so many rows.

    Raises:
        ValueError: there is no such coder for these widths.
    """
    with torch.device("meta"):  # shapes alone, no memory
        coder = Coder(config, input_width, target_width)
    trained = [p for p in coder.parameters() if p.requires_grad]
    matrix, vector = MOMENTS[config.optimizer]
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


def pass_bytes(needs: Sequence[CoderMemory]) -> int:
    """Of coders that are held together and stepped one after another."""
    return sum(one.held_bytes for one in needs) + max(one.step_bytes for one in needs)


def group_into_passes(
    needs: Sequence[CoderMemory], most: int | None, ranks: ProcessGroup = SINGLE_PROCESS
) -> list[list[str]]:
    """Names of coders that fit into `most` bytes together, in their order; None: all of them.
    Where ranks share coders, the share of each has so many bytes.

    Raises:
        ValueError: one of them does not fit alone.
    """
    passes: list[list[CoderMemory]] = []
    for one in needs:
        if most is not None and pass_bytes([one]) > most:
            raise UsageError(
                f"max_memory must hold at least one coder, got {most} bytes, but {one.name} needs "
                f"{pass_bytes([one])}: {one.weights_bytes} for weights, {one.optimizer_bytes} for "
                f"the optimizer, {one.step_bytes} for a train step (estimated); use fewer latents, "
                "--batch-rows or --micro-batch-rows, or more memory"
            )
        if passes and (most is None or _fit([*passes[-1], one], most, ranks)):
            passes[-1].append(one)
        else:
            passes.append([one])
    return [[one.name for one in together] for together in passes]


def _fit(needs: Sequence[CoderMemory], most: int, ranks: ProcessGroup) -> bool:
    return all(pass_bytes(share) <= most for share in ranks.all_coders(needs) if share)


def _step_bytes(coder: Coder, D: int, E: int, rows: int, device: torch.device) -> int:
    """Gradients, the rows at work, their codes and scores, and what the optimizer works in."""
    config, M = coder.config, coder.latents
    B = min(rows, config.micro_batch_rows or rows)
    sizes = [p.numel() for p in coder.parameters() if p.requires_grad]
    gradients = _FLOAT * sum(sizes)
    whole = _FLOAT * rows * (2 * E + (D if config.kind == "sae" else D + E))  # filtered, centred
    at_work = _FLOAT * _ROW_COPIES * B * (D + E)
    codes = _ENTRY * B * _entries(config, M, D)
    scores = _scores(coder, B, device) + _refit(coder, D, device)
    return gradients + whole + at_work + codes + scores + _update(coder)


def _entries(config: CoderConfig, M: int, D: int) -> int:
    """Entries of a row's codes that are there together, those of the dead included."""
    own = math.ceil(config.k_factor * config.k)  # at the beginning
    own *= config.architecture.entries
    wide = WIDE * config.k if config.multi_topk else 0
    dead = D // 2 if config.auxk_alpha else 0
    return min(own, M) + min(wide, M) + min(dead, M)


def _scores(coder: Coder, B: int, device: torch.device) -> int:
    config, M = coder.config, coder.latents
    at_once = min(B, microbatch_rows(M, device))
    scores = 2 * _FLOAT * at_once * M
    if not config.architecture.is_pursuit or config.codes != "mp":
        return scores
    assert isinstance(coder.encoder, PursuitEncoder)
    backend = resolve(coder.encoder.search, M, B * config.k, config.blocks != "none")
    return scores + (_FLOAT * M**2 if backend == "gram" else 0)


def _refit(coder: Coder, D: int, device: torch.device) -> int:
    """A micro-batch's chosen atoms and their products, and what autograd keeps of the way back."""
    config = coder.config
    if not config.architecture.is_pursuit or config.codes == "mp":
        return 0
    k = config.k * config.architecture.entries
    rows = refit_rows(coder.latents, D, k, device)
    steps = k if config.codes == "gp" else 2  # gp's fit is a chain of K steps, omp's in float64
    return _FLOAT * rows * k * (4 * D + (3 + steps) * k) + _FLOAT * coder.latents * D


def _update(coder: Coder) -> int:
    """Muon orthogonalises one matrix at a time: its update, and three copies in bfloat16."""
    matrices = [p.numel() for p in coder.parameters() if p.requires_grad and p.ndim == 2]
    return 10 * max(matrices, default=0) if coder.config.optimizer == "muon" else 0
