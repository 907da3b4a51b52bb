"""Hookpoints -> the values at their inputs and outputs, while the model runs.

B: sequences in a forward pass. L: tokens in a sequence.
"""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import TracebackType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mpcache.errors import UsageError
from mpcache.validation import is_hookpoint

SideName = Literal["input", "output"]

# the last segment of a hookpoint that is an MLP, of which a transcoder needs both sides
MLP_NAMES = {"mlp", "ffn", "ff", "feed_forward", "feedforward", "block_sparse_moe"}
PROBE = (2, 3)  # B, L of the pass that measures; unlike, so that swapped axes show
LIST_THEM = "`mpcache hookpoints MODEL` lists all that can be collected"


@dataclass(frozen=True, order=True)
class Side:
    """One side of a hookpoint."""

    hookpoint: str
    side: SideName

    def __str__(self) -> str:
        return f"{self.hookpoint}:{self.side}"

    @classmethod
    def parse(cls, text: str) -> "Side":
        """The side that `str` writes so."""
        hookpoint, _, side = text.rpartition(":")
        return cls(hookpoint, "input" if side == "input" else "output")


Keep = Callable[[Side, Float[Tensor, "B L W"]], None]


class _Unfit(UsageError):
    """A side that cannot be collected, and why."""

    def __init__(self, side: Side, reason: str) -> None:
        super().__init__(f"{side} cannot be collected: {reason}")
        self.side, self.reason = side, reason


class _AllSeen(Exception):
    """Ends a forward pass whose remaining layers nobody asked for."""


# --- names ---


def resolve(patterns: Iterable[str], model: nn.Module) -> tuple[Side, ...]:
    """The sides that patterns name, in the model's order, each once.

    Raises UsageError for a pattern that is malformed or matches no module.
    """
    names = [name for name, _ in model.named_modules() if name]
    wanted = {side for pattern in patterns for side in match(pattern, names, model)}
    rank = {name: place for place, name in enumerate(names)}
    return tuple(sorted(wanted, key=lambda side: (rank[side.hookpoint], side.side)))


def match(pattern: str, names: list[str], model: nn.Module) -> list[Side]:
    """The sides that one pattern names; input sorts before output."""
    hookpoint, colon, side = pattern.partition(":")
    segments = check_segments(hookpoint)
    if colon and side not in ("input", "output"):
        raise UsageError(f"a side must be input or output, got {side!r} in {pattern!r}")
    found = [name for name in names if is_match(segments, name.split("."))]
    if not found:
        raise UsageError(
            f"a hookpoint must be a module of {type(model).__name__}, got {hookpoint}; "
            f"near: {', '.join(near_names(hookpoint, names))}; {LIST_THEM}"
        )
    if strange := [name for name in found if not is_hookpoint(name)]:
        raise UsageError(
            f"{pattern} matches the module {strange[0]!r}, whose name cannot be a folder's; "
            "name the others one by one"
        )
    return [side_ for name in found for side_ in sides_of(name, side)]


def check_segments(hookpoint: str) -> list[str]:
    """The segments of a hookpoint; it becomes a path in the store, so nothing may lead astray."""
    segments = hookpoint.split(".")
    if not hookpoint.isprintable() or re.search(r"[\s/\\]", hookpoint) or "" in segments:
        raise UsageError(
            f"a hookpoint must be names joined by dots, got {hookpoint!r}; write layers.10.mlp"
        )
    if any("*" in segment and segment != "*" for segment in segments):
        raise UsageError(f"* must be a whole segment, got {hookpoint!r}; write layers.*.mlp")
    return segments


def is_match(pattern: list[str], segments: list[str]) -> bool:
    return len(pattern) == len(segments) and all(
        wanted in ("*", got) for wanted, got in zip(pattern, segments, strict=True)
    )


def sides_of(hookpoint: str, side: str) -> list[Side]:
    """The side asked for; without one, the output, and for an MLP both."""
    if side == "input":
        return [Side(hookpoint, "input")]
    is_both = not side and hookpoint.rpartition(".")[2].lower() in MLP_NAMES
    return [Side(hookpoint, "input")] * is_both + [Side(hookpoint, "output")]


def near_names(hookpoint: str, names: list[str]) -> list[str]:
    """The model's names most like a wrong one, first as patterns."""
    patterns = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))
    starred = re.sub(r"\b\d+\b", "*", hookpoint)
    near = [
        *get_close_matches(starred, patterns, n=3, cutoff=0.5),
        *get_close_matches(hookpoint, names, n=3, cutoff=0.6),
    ]
    return list(dict.fromkeys(near)) or patterns[:5]


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
        except _Unfit as unfit:
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
            if reason := times_fault(self._times[side]):
                raise _Unfit(side, reason)

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
        if reason := value_fault(value, self._shape):
            raise _Unfit(side, reason)
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
        if value_fault(input_of(args, kwargs), PROBE) is None:
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


def value_fault(value: object, shape: tuple[int, ...]) -> str | None:
    """Why a value is not one row for each token of `shape`, (B, L); None if it is."""
    got = type(value).__name__
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.ndim == 3 and tuple(value.shape[:2]) == shape:
            return None
        got = f"{value.dtype} {list(value.shape)}"
        if value.is_floating_point() and value.ndim == 4 and tuple(value.shape[1:3]) == shape:
            got += f", which is {len(value)} streams of rows"
    return f"its value must be floats [B, L, width] with B, L = {list(shape)}, got {got}"


def times_fault(times: int) -> str | None:
    """Why a module that ran `times` times in a pass over text has no rows; None if it has."""
    if times == 1:
        return None
    times_ = "does not run" if times == 0 else f"runs {times} times"
    return f"it must run once in a pass over text, but it {times_}"
