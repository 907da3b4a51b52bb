"""Metrics of a language model with a coder in it; they need both packages."""

import functools
from pathlib import Path


def spliced_figures(
    folder: Path, store: str, model: str, revision: str, device: str, trust_remote_code: bool
) -> dict[str, float | None]:
    """What the model loses if a coder replaces a side: figures on the store's held-out tokens.

    The model and the coder meet only here, because neither package imports the other.

    Raises:
        UsageError: the folder holds no coder, or the model is not the store's.
    """
    from mpcache.model.hookpoint_patterns import Side
    from mpcache.model.splice import SplicedModel
    from mptrain.coders.checkpoint import load_coder
    from mptrain.data.filters import filters_from_json
    from mptrain.evals.loss_recovered import Prediction, measure_loss_recovered

    coder, trained = load_coder(folder)
    spliced = SplicedModel(store, model, revision, device, trust_remote_code)
    coder.to(spliced.model.device)
    source, target = (Side.parse(side) for side in (*coder.config.inputs, *coder.config.targets))
    predictions = (
        Prediction(
            tokens_BL=example.tokens_BL,
            wanted_BL=example.wanted_BL,
            counts_BL=example.counts_BL,
            by_assistant_BL=example.by_assistant_BL,
            run=functools.partial(spliced.logits, example.inputs, source, target),
        )
        for example in spliced.examples()
    )
    return measure_loss_recovered(coder, predictions, filters_from_json(trained)).figures(
        spliced.head
    )
