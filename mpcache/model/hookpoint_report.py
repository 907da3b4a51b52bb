"""The hookpoints of a model, known from its config alone."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from mpcache.config import CollectConfig
from mpcache.errors import UsageError, first_line
from mpcache.model.alike_hookpoints import HookpointGroup, group_modules
from mpcache.model.hookpoint_roles import HookpointRole, roles
from mpcache.model.hookpoint_survey import HookpointSurvey
from mpcache.model.meta_forward import MetaForward, materialize_small_tensors_
from mpcache.model.skeleton import skeleton


@dataclass(frozen=True, kw_only=True)
class HookpointReport:
    """What can be collected from a model."""

    model: str
    "the model as the user named it"
    model_class: str
    attention: str
    "attention implementation that the report is about"
    has_no_sdpa: bool
    "the model has no sdpa attention, so `collect` needs another attention implementation"
    hookpoints: tuple[HookpointGroup, ...]
    "all modules, those that are alike in one group"
    roles: tuple[HookpointRole, ...]
    "sides with a meaning, such as the residual stream and the input of the MLP"

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def hookpoints(
    model: str,
    *,
    revision: str = "main",
    attention: Literal["sdpa", "eager"] | None = None,
    trust_remote_code: bool = False,
) -> HookpointReport:
    """List what can be collected from a model, without loading its weights.

    A model of any size takes seconds and little memory: a tiny pass runs on tensors without
    content. Widths are in values per row, and one row is one token.

    Args:
        model: Hugging Face id, local folder or .gguf file. A folder needs config.json only.
        revision: branch, tag or commit of a Hugging Face model.
        attention: attention implementation; None takes sdpa, or eager if the model has no sdpa.
        trust_remote_code: run the Python code that comes with the model.

    Raises:
        UsageError: there is no such model, or the model does not run on text alone.
        ConnectionError: the Hub cannot be reached.

    Example:
        >>> import tempfile
        >>> import mpcache
        >>> from transformers import GPT2Config
        >>> folder = tempfile.mkdtemp()
        >>> config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=260)
        >>> config.save_pretrained(folder)
        >>> report = mpcache.hookpoints(folder)
        >>> [(g.hookpoint, g.numbers, g.output) for g in report.hookpoints if g.output == 128]
        [('h.*.mlp.c_fc', '0-1', 128), ('h.*.mlp.act', '0-1', 128)]
        >>> [role.side for role in report.roles if role.role == "residual stream"]
        ['h.*:output']
    """
    settings = CollectConfig(
        model=model,
        revision=revision,
        trust_remote_code=trust_remote_code,
        attention=attention or "sdpa",
        dataset="",
        hookpoints=("*",),
        ctx_len=1,
    )
    base, used_attention = _weightless_model(settings, may_use_eager=attention is None)
    survey = _survey_model(base)
    return HookpointReport(
        model=model,
        model_class=type(base).__name__,
        attention=used_attention,
        has_no_sdpa=attention is None and used_attention != "sdpa",
        hookpoints=group_modules(base, survey),
        roles=roles(survey),
    )


def _weightless_model(config: CollectConfig, *, may_use_eager: bool) -> tuple[PreTrainedModel, str]:
    """The model without weights, ready to run inside `MetaForward`, and its attention."""
    try:
        model = skeleton(config)
    except UsageError:
        if not may_use_eager:
            raise
        eager = replace(config, attention="eager")
        try:
            model, config = skeleton(eager), eager
        except UsageError:
            skeleton(config)  # raises the first error, which helps more
            raise
    except ImportError as error:
        raise UsageError(
            f"{config.model} needs a library that is not installed: {first_line(error)}; install "
            "the library"
        ) from error
    materialize_small_tensors_(model)
    model.train(False).requires_grad_(False)
    return model, config.attention


def _survey_model(model: PreTrainedModel) -> HookpointSurvey:
    """Raises UsageError for a model that does not run on tokens alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    try:
        with MetaForward() as forward:
            try:
                return HookpointSurvey(model.to(torch.bfloat16), forward.added)  # type: ignore[arg-type]  # hidden by a decorator
            except (RuntimeError, TypeError):  # few models compute in float32 alone
                return HookpointSurvey(model.to(torch.float32), forward.added)  # type: ignore[arg-type]
    except Exception as error:  # what a model raises that lacks an input has no common base
        raise UsageError(
            f"{type(model).__name__} must run with only tokens as its input, but it raises "
            f"{type(error).__name__}: {first_line(error)}; use a language model"
        ) from error
    finally:
        torch.set_num_threads(threads)
