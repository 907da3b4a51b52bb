"""Hookpoints -> the values at their inputs and outputs, while the model runs.

B: sequences in a forward pass. L: tokens in a sequence.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mpcache.errors import UsageError
from mpcache.model.hookpoint_patterns import (
    LIST_THEM,
    Side,
)

PROBE = (2, 3)  # B, L of the pass that measures; unlike, so that swapped axes show

Keep = Callable[[Side, Float[Tensor, "B L W"]], None]


class _UncollectableSide(UsageError):
    """A side that cannot be collected, and why."""

    def __init__(self, side: Side, reason: str) -> None:
        super().__init__(f"{side} cannot be collected: {reason}")
        self.side, self.reason = side, reason


class _AllSeen(Exception):
    """Ends a forward pass whose remaining layers nobody asked for."""


# --- names ---


# --- values ---


def forward_options(model: nn.Module) -> dict[str, bool]:
    """No cache, where a model knows one: beside one, restarting positions would make no mask."""
    takes = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in takes else {}


class Capture:
    """Hooks on a model that record sides, as a context manager.

    Entering runs one tiny pass to the end, which raises UsageError for a side that is not seen
    exactly once or whose value is not [B, L, width]; `widths` then holds each side's width.
    """

    def __init__(self, model: nn.Module, sides: Iterable[Side]) -> None:
        self.model, self.sides = model, tuple(sides)
        self.widths: dict[Side, int] = {}
        self._handles: list[RemovableHandle] = []
        self._times: Counter[Side] = Counter()
        self._shape: tuple[int, ...] = PROBE
        self._is_probe = False
        self._options = forward_options(model)

    def __enter__(self) -> "Capture":
        modules = dict(self.model.named_modules())
        for side in self.sides:
            self._handles.append(self._register(modules[side.hookpoint], side))
        try:
            self._probe()
        except _UncollectableSide as unfit:
            self._remove()
            stream = one_stream(self.model, unfit.side) if "streams" in unfit.reason else None
            remedy = f"use {stream}" if stream else LIST_THEM
            raise UsageError(f"{unfit}; {remedy}") from None
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def run(self, model_inputs: Mapping[str, Any], keep: Keep) -> None:
        """One pass, no deeper than needed; `keep` is given each value while the model stands at it.

        It must copy what it wants and change nothing: some models go on in place (Falcon adds its
        attention to the MLP's output).
        """
        assert self._handles, "run inside the context"
        self._keep, self._times = keep, Counter()
        self._shape = tuple(model_inputs["input_ids"].shape)
        try:
            with torch.no_grad():  # inference_mode would leave its mark on tensors the model caches
                self.model(**model_inputs, **self._options)
        except _AllSeen:
            pass
        for side in self.sides:
            if reason := call_count_problem(self._times[side]):
                raise _UncollectableSide(side, reason)

    def _probe(self) -> None:
        self._is_probe = True
        device = next(self.model.parameters()).device
        found: dict[Side, int] = {}
        self.run(
            {"input_ids": torch.ones(PROBE, dtype=torch.int64, device=device)},
            lambda side, value_BLW: found.update({side: value_BLW.shape[-1]}),
        )
        self._is_probe = False
        self.widths = {side: found[side] for side in self.sides}

    def _register(self, module: nn.Module, side: Side) -> RemovableHandle:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(side, input_of(args, kwargs))

        def after(_: nn.Module, args: object, kwargs: object, output: object) -> None:
            self._see(side, output_of(output))

        if side.side == "input":
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after, with_kwargs=True)

    def _see(self, side: Side, value: object) -> None:
        self._times[side] += 1
        if reason := value_problem(value, self._shape):
            raise _UncollectableSide(side, reason)
        assert isinstance(value, Tensor)
        self._keep(side, value)
        if len(self._times) == len(self.sides) and not self._is_probe:
            raise _AllSeen

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def widths(model: nn.Module, sides: Iterable[Side]) -> dict[Side, int]:
    """The width of each side, by one tiny pass; raises what entering a Capture raises."""
    with Capture(model, sides) as capture:
        return capture.widths


def one_stream(model: nn.Module, side: Side) -> Side | None:
    """What a hookpoint with several streams reads as its rows: the input of its first module.

    Gemma 3n keeps four streams side by side, of which a layer's modules read one.
    """
    seen: list[Side] = []

    def look(child: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if value_problem(input_of(args, kwargs), PROBE) is None:
            seen.append(Side(f"{side.hookpoint}.{child}", "input"))

    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, child=child: look(child, args, kwargs), with_kwargs=True
        )
        for child, module in model.get_submodule(side.hookpoint).named_children()
    ]
    try:
        probe(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0] if seen else None


def probe(model: nn.Module) -> None:
    """One tiny pass over text, to the end."""
    tokens_BL = torch.ones(PROBE, dtype=torch.int64, device=next(model.parameters()).device)
    with torch.no_grad():
        model(input_ids=tokens_BL, **forward_options(model))


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
    """What a module reads: its first positional tensor, `hidden_states`, else the first 3-D one."""
    keyword = kwargs.get("hidden_states")
    rest = [v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point()]
    positional = [value for value in args if isinstance(value, Tensor)]
    candidates = [*positional[:1], keyword, *(value for value in rest if value.ndim == 3)]
    return next((value for value in candidates if value is not None), None)


def output_of(output: object) -> object:
    """What a module writes: a tensor, the first of a tuple or list, or of a ModelOutput."""
    if isinstance(output, Mapping):
        return next(iter(output.values()), None)
    if isinstance(output, tuple | list):
        return output[0] if output else None
    return output


def value_problem(value: object, shape: tuple[int, ...]) -> str | None:
    """Why a value is not one row for each token of `shape`, (B, L); None if it is."""
    got = type(value).__name__
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.ndim == 3 and tuple(value.shape[:2]) == shape:
            return None
        got = f"{value.dtype} {list(value.shape)}"
        if value.is_floating_point() and value.ndim == 4 and tuple(value.shape[1:3]) == shape:
            got += f", which is {len(value)} streams of rows"
    return f"its value must be floats [B, L, width] with B, L = {list(shape)}, got {got}"


def call_count_problem(times: int) -> str | None:
    """Why a module that ran `times` times in a pass over text has no rows; None if it has."""
    if times == 1:
        return None
    times_ = "does not run" if times == 0 else f"runs {times} times"
    return f"it must run once in a pass over text, but it {times_}"
