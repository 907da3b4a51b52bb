"""The learning rates of trainers: their defaults, and where a search for a better one begins."""

from dataclasses import replace

from benchmarks.trainer_settings import Setting, fit_config
from mptrain.config.coder import CoderConfig
from mptrain.training.learning_rate import learning_rate, rule_of


def default_rate(setting: Setting, width: int) -> float:
    """The rate that the tool takes where none is given.

    SAELens has one rate for all. sparsify's rule is that of its default optimizer, signum.
    """
    if setting.tool == "sae-lens":
        return 3e-4
    if setting.tool == "eai-sparsify":
        return float(f"{5e-3 / (setting.latents / 2**14) ** 0.5:.6g}")
    return learning_rate(_coder_config(setting), width, setting.batch_rows, setting.steps).value


def start_rate(setting: Setting, width: int) -> float:
    """Where a search begins.

    SAELens' rate for long runs is far too low here, so its search begins at our rule for Adam.
    """
    if setting.tool != "sae-lens":
        return default_rate(setting, width)
    config = replace(_coder_config(setting), optimizer="adam")
    return learning_rate(config, width, setting.batch_rows, setting.steps).value


def scaled_rate(lr: float, old: Setting, new: Setting) -> float:
    """A rate for another length and batch, by the exponents of our rule, in three digits."""
    rule = rule_of(_coder_config(old))
    steps = (new.steps / old.steps) ** rule.steps
    rows = (new.batch_rows / old.batch_rows) ** rule.batch_rows
    return float(f"{lr * steps * rows:.3g}")


def _coder_config(setting: Setting) -> CoderConfig:
    (config,) = fit_config(replace(setting, lr=None), "", "").coders()
    return config
