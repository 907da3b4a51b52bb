"""Named variants of matching pursuit: the paper's form, and those of the ablations.

`PRESETS` maps each name to the options of `CoderConfig` that the variant sets. The variants are
those of `sparsify`'s branch `mp-sae` ("Matching Pursuit SAEs replication", EleutherAI 2025),
without its faults; the names in brackets are that branch's options.
"""

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Costa et al. 2025, arXiv 2506.03093: no bias, no rectifier
    "paper": {"select": "signed", "bias": False},
    # [matching_pursuit, normalize_decoder, normalize_encoder]: what the others differ from
    "mp": {},
    # [without normalize_decoder, normalize_encoder]
    "free-norm": {"free_norm": True},
    # [mp_encoder off]
    "separate": {"subtract": "separate"},
    # [mp_untie off for transcoders; a decoder of its own for SAEs]
    "predicting": {"subtract": "predicting"},
    # [mp_detach]
    "detach": {"detach": True},
    # [per_step_loss]
    "per-step-loss": {"per_step_loss": True},
    # [mp_aux]
    "input-loss": {"input_loss": 1.0},
    # [slice_encoder and slice_decoder, each alone]: the best transcoder of the replication
    "sliced": {"blocks": "both"},
    "sliced-selecting": {"blocks": "selecting"},
    "sliced-predicting": {"blocks": "predicting"},
    # [turn_on_mp_step]
    "from-topk": {"begin_as": "topk", "begin_share": 0.1},
    "from-groupmax": {"begin_as": "groupmax", "begin_share": 0.1},
    # [ito]
    "gradient-pursuit": {"codes": "gp"},
    "orthogonal": {"codes": "omp"},
    # [k_decay_steps]
    "k-decay": {"k_factor": 2.0, "k_decay_share": 0.5},
    "nested": {"nested": True},
}
