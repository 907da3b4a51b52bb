"""Train sparse coders from a store of activations: matching pursuit, TopK and others.

The names in `__all__` are the public interface; everything else may change without notice. Each is
imported when it is first used, so that `import mptrain` is fast.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers see of the names below
    from mptrain.coders.checkpoint import load_coder as load_coder
    from mptrain.coders.checkpoint import save_coder as save_coder
    from mptrain.coders.code import Code as Code
    from mptrain.coders.coder import Coder as Coder
    from mptrain.config.coder import CoderConfig as CoderConfig
    from mptrain.config.coder_grid import FitConfig as FitConfig
    from mptrain.config.presets import PRESETS as PRESETS
    from mptrain.data.loader import Loader as Loader
    from mptrain.evals.evaluate import Evaluation as Evaluation
    from mptrain.evals.evaluate import evaluate_coder as evaluate_coder
    from mptrain.experiments.sweep import sweep as sweep
    from mptrain.runs.fit import fit as fit
    from mptrain.runs.metrics_file import read_records as read_records
    from mptrain.tuning.tune import tune as tune

_MODULES = {
    "Code": "mptrain.coders.code",
    "Coder": "mptrain.coders.coder",
    "CoderConfig": "mptrain.config.coder",
    "Evaluation": "mptrain.evals.evaluate",
    "FitConfig": "mptrain.config.coder_grid",
    "Loader": "mptrain.data.loader",
    "PRESETS": "mptrain.config.presets",
    "evaluate_coder": "mptrain.evals.evaluate",
    "fit": "mptrain.runs.fit",
    "load_coder": "mptrain.coders.checkpoint",
    "read_records": "mptrain.runs.metrics_file",
    "save_coder": "mptrain.coders.checkpoint",
    "sweep": "mptrain.experiments.sweep",
    "tune": "mptrain.tuning.tune",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
