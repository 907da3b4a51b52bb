"""What a coder keeps of the language model's behaviour when its prediction replaces the target.

B: sequences. L: tokens in a sequence. N: predictions that count. V: size of the vocabulary.
D: input width, E: target width.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mpcache.errors import UsageError
from mptrain.coders.coder import Coder
from mptrain.data.filters import Filters

Replace = Callable[[Tensor, Tensor], Tensor]
# logits [B, L, V] of the model, with the target side replaced where a replacement is given
Run = Callable[[Replace | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A batch of held-out tokens, and what the language model is to predict."""

    tokens_BL: Int64[Tensor, "B L"]
    wanted_BL: Int64[Tensor, "B L"]
    "the token that the logits of a position are to predict"
    counts_BL: Bool[Tensor, "B L"]
    "whether the logits of a position count"
    by_assistant_BL: Bool[Tensor, "B L"] | None = None
    "whether the assistant of a conversation wrote the token; None: the store does not say"
    run: Run


@dataclass(frozen=True, kw_only=True)
class LossRecovered:
    """Cross-entropies in nats a token, over the same held-out tokens."""

    tokens: int
    "tokens predicted"
    ce_clean: float
    "the model as it is"
    ce_spliced: float
    "the target side replaced by the coder's prediction"
    ce_zero: float
    "the target side replaced by zeros"
    ce_recovered: float | None
    "(ce_zero - ce_spliced) / (ce_zero - ce_clean): 1: nothing lost; None: zeros cost nothing"
    kl: float
    "divergence of the spliced model's distribution of a predicted token from the clean one's"

    def figures(self, head: str) -> dict[str, float | int | None]:
        """The figures by name: those of a masked head, which sees both sides, are others."""
        prefix = "masked_" if head == "masked" else ""
        return {f"{prefix}{name}": value for name, value in asdict(self).items()}


def measure_loss_recovered(
    coder: Coder, predictions: Iterable[Prediction], filters: Filters
) -> LossRecovered:
    """Splice the coder into the model; tokens whose rows it never saw stay clean.

    A token that is hidden from the model counts as the token that it is.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    for prediction in predictions:
        sums += _sums(coder, prediction, filters)
        tokens += int(prediction.counts_BL.sum())
    if not tokens:
        raise UsageError(
            "the held-out sequences must have a token to predict, got none: they are too short, "
            "or hold only special tokens; collect with a larger --ctx-len, or collect other "
            "documents"
        )
    clean, spliced, zero, kl = (sums / tokens).tolist()
    return LossRecovered(
        tokens=tokens,
        ce_clean=clean,
        ce_spliced=spliced,
        ce_zero=zero,
        ce_recovered=(zero - spliced) / (zero - clean) if zero != clean else None,
        kl=kl,
    )


def _sums(coder: Coder, prediction: Prediction, filters: Filters) -> Float[Tensor, " 4"]:
    tokens_BL, counts_BL = prediction.tokens_BL, prediction.counts_BL

    def predicted(x_BLD: Tensor, y_BLE: Tensor) -> Tensor:
        y_hat_BLE = coder(x_BLD.flatten(0, 1).float()).view_as(y_BLE)
        return torch.where(taken(x_BLD, y_BLE), y_hat_BLE, y_BLE.float())

    def zero(x_BLD: Tensor, y_BLE: Tensor) -> Tensor:
        return torch.where(taken(x_BLD, y_BLE), 0, y_BLE)

    def taken(x_BLD: Tensor, y_BLE: Tensor) -> Tensor:
        values = dict(zip(coder.config.sides, (x_BLD, y_BLE), strict=True))
        norms = {side: value.float().norm(dim=-1) for side, value in values.items()}
        position_BL = torch.arange(tokens_BL.shape[1]).to(tokens_BL.device).expand_as(tokens_BL)
        own = filters.of(coder.config.sides)
        return own.passed(position_BL, tokens_BL, norms, prediction.by_assistant_BL)[..., None]

    logits = (prediction.run(new)[counts_BL] for new in (None, predicted, zero))
    logs = [F.log_softmax(logits_NV, dim=-1) for logits_NV in logits]
    wanted_N1 = prediction.wanted_BL[counts_BL][:, None]
    entropies = [-log.gather(1, wanted_N1).double().sum().cpu() for log in logs]
    kl = F.kl_div(logs[1], logs[0], reduction="sum", log_target=True).double().cpu()
    return torch.stack([*entropies, kl])
