"""Hooks that read values at the inputs and outputs of modules while the model runs.

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

PROBE = (2, 3)  # B, L of the measuring pass; unequal, so that swapped axes are noticed

OnValue = Callable[[Side, Float[Tensor, "B L W"]], None]
"receives the value of each side"


class _UncollectableSide(UsageError):
    """A side that cannot be collected, and the reason."""

    def __init__(self, side: Side, reason: str) -> None:
        super().__init__(f"{side} cannot be collected: {reason}")
        self.side, self.reason = side, reason


class _AllSeen(Exception):
    """Ends a forward pass after the last side that is captured."""


# --- names ---


# --- values ---


def forward_options(model: nn.Module) -> dict[str, bool]:
    """Arguments that turn off the cache: with a cache, restarting positions make no mask."""
    takes = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in takes else {}


class Capture:
    """Hooks on a model that record sides, as a context manager.

    Entering runs one tiny pass to the end and sets `widths`, the width of each side. It raises
    UsageError for a side that does not run exactly once or whose value is not [B, L, width].
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
        except _UncollectableSide as error:
            self._remove()
            stream = single_stream(self.model, error.side) if "streams" in error.reason else None
            remedy = f"use {stream}" if stream else LIST_THEM
            raise UsageError(f"{error}; {remedy}") from None
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

    def run(self, model_inputs: Mapping[str, Any], on_value: OnValue) -> None:
        """Run one pass, which ends after the last side. `on_value` receives each value in turn.

        `on_value` must copy what it keeps and change nothing: some models go on in place, as Falcon
        adds its attention to the MLP's output.
        """
        assert self._handles, "run inside the context"
        self._on_value, self._times = on_value, Counter()
        self._shape = tuple(model_inputs["input_ids"].shape)
        try:
            with torch.no_grad():  # inference_mode would mark tensors that the model caches
                self.model(**model_inputs, **self._options)
        except _AllSeen:
            pass
        for side in self.sides:
            if reason := call_count_problem(self._times[side]):
                raise _UncollectableSide(side, reason)

    def _probe(self) -> None:
        self._is_probe = True
        device = next(self.model.parameters()).device
        widths: dict[Side, int] = {}
        self.run(
            {"input_ids": torch.ones(PROBE, dtype=torch.int64, device=device)},
            lambda side, value_BLW: widths.update({side: value_BLW.shape[-1]}),
        )
        self._is_probe = False
        self.widths = {side: widths[side] for side in self.sides}

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
        self._on_value(side, value)
        if len(self._times) == len(self.sides) and not self._is_probe:
            raise _AllSeen

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def widths(model: nn.Module, sides: Iterable[Side]) -> dict[Side, int]:
    """The width of each side, from one tiny pass. Raises the same errors as `Capture`."""
    with Capture(model, sides) as capture:
        return capture.widths


def single_stream(model: nn.Module, side: Side) -> Side | None:
    """The input of the first module inside a hookpoint with several streams.

    Gemma 3n has four streams side by side; the modules of a layer read one of them.
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
    """The input of a module: the first positional tensor, `hidden_states`, or a 3-D keyword."""
    keyword = kwargs.get("hidden_states")
    rest = [v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point()]
    positional = [value for value in args if isinstance(value, Tensor)]
    candidates = [*positional[:1], keyword, *(value for value in rest if value.ndim == 3)]
    return next((value for value in candidates if value is not None), None)


def output_of(output: object) -> object:
    """The output of a module: a tensor, or the first item of a tuple, list or ModelOutput."""
    if isinstance(output, Mapping):
        return next(iter(output.values()), None)
    if isinstance(output, tuple | list):
        return output[0] if output else None
    return output


def value_problem(value: object, shape: tuple[int, ...]) -> str | None:
    """Why a value is not one row for each token of `shape`, (B, L); None if all is well."""
    got = type(value).__name__
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.ndim == 3 and tuple(value.shape[:2]) == shape:
            return None
        got = f"{value.dtype} {list(value.shape)}"
        if value.is_floating_point() and value.ndim == 4 and tuple(value.shape[1:3]) == shape:
            got += f", which is {len(value)} streams of rows"
    return f"its value must be floats [B, L, width] with B, L = {list(shape)}, got {got}"


def call_count_problem(times: int) -> str | None:
    """Why a module that ran `times` times in a pass has no rows; None if it has rows."""
    if times == 1:
        return None
    actual = "does not run" if times == 0 else f"runs {times} times"
    return f"it must run once in a pass over text, but it {actual}"
