"""What a coder keeps of the language model's behaviour, spliced in at its hookpoint.

B: sequences. L: tokens in a sequence. V: size of the vocabulary. D: input width, E: target width.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mptrain.coder import Coder
from mptrain.filters import Filters

Replace = Callable[[Tensor, Tensor], Tensor]
# next-token logits [B, L, V] of the model, with the hookpoint's output replaced if told to
Run = Callable[[Replace | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """Cross-entropies in nats a token, over the same held-out tokens."""

    tokens: int
    ce_clean: float
    "the model as it is"
    ce_spliced: float
    "the hookpoint's output replaced by the coder's prediction"
    ce_zero: float
    "the hookpoint's output replaced by zeros"
    ce_recovered: float | None
    "(ce_zero - ce_spliced) / (ce_zero - ce_clean): 1: nothing lost; None: zeros cost nothing"
    kl: float
    "divergence of the spliced model's next-token distribution from the clean one's"


def recovered(
    coder: Coder,
    batches: Iterable[tuple[Int64[Tensor, "B L"], Run]],
    filters: Filters,
    assistant: Iterable[Bool[Tensor, "B L"]] | None = None,
) -> Recovered:
    """Splice the coder into the model; tokens whose rows it never saw stay clean.

    `assistant` says of each batch's tokens whether the assistant wrote them.
    """
    masks = itertools.repeat(None) if assistant is None else iter(assistant)
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    for tokens_BL, run in batches:
        sums += _sums(coder, tokens_BL, run, filters, next(masks))
        tokens += tokens_BL[:, 1:].numel()
    clean, spliced, zero, kl = (sums / tokens).tolist()
    return Recovered(
        tokens=tokens,
        ce_clean=clean,
        ce_spliced=spliced,
        ce_zero=zero,
        ce_recovered=(zero - spliced) / (zero - clean) if zero != clean else None,
        kl=kl,
    )


def _sums(
    coder: Coder,
    tokens_BL: Int64[Tensor, "B L"],
    run: Run,
    filters: Filters,
    assistant_BL: Bool[Tensor, "B L"] | None,
) -> Float[Tensor, " 4"]:
    def predicted(x_BLD: Tensor, y_BLE: Tensor) -> Tensor:
        source_BLD = y_BLE if coder.config.kind == "sae" else x_BLD
        y_hat_BLE = coder(source_BLD.flatten(0, 1).float()).view_as(y_BLE)
        return torch.where(taken(x_BLD, y_BLE), y_hat_BLE, y_BLE.float())

    def zero(x_BLD: Tensor, y_BLE: Tensor) -> Tensor:
        return torch.where(taken(x_BLD, y_BLE), 0, y_BLE)

    def taken(x_BLD: Tensor, y_BLE: Tensor) -> Tensor:
        hookpoint, position_L = coder.config.hookpoint, torch.arange(tokens_BL.shape[1])
        pairs = {"input": x_BLD, "output": y_BLE}
        norms = {(hookpoint, side): v.float().norm(dim=-1) for side, v in pairs.items()}
        position_BL = position_L.to(tokens_BL.device).expand_as(tokens_BL)
        return filters.passed(position_BL, tokens_BL, norms, assistant_BL)[..., None]

    logs = [F.log_softmax(run(new)[:, :-1], dim=-1) for new in (None, predicted, zero)]
    following_BL1 = tokens_BL[:, 1:, None]
    entropies = [-log.gather(2, following_BL1).double().sum().cpu() for log in logs]
    kl = F.kl_div(logs[1], logs[0], reduction="sum", log_target=True).double().cpu()
    return torch.stack([*entropies, kl])
