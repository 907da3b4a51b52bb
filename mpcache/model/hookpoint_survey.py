"""Which sides of a model's modules have one row for each token, seen in one tiny pass.

The verdicts use the same functions as `Capture`, so both agree.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mpcache.model.hookpoint_patterns import Side, SideName
from mpcache.model.hooks import PROBE, call_count_problem, input_of, output_of, probe, value_problem
from mpcache.untrusted_names import is_hookpoint

_ODD_NAME = "its name cannot be a folder's"
_CONTAINER = "it only contains modules that run"


@dataclass(frozen=True)
class SideVerdict:
    """The width of a side that can be collected, or the reason why it cannot."""

    width: int | None
    reason: str | None


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module, with its input and output tensors."""

    name: str
    input: object
    output: object
    additions: range
    "indices of the additions during the call"


class HookpointSurvey:
    """What one pass over text shows of each module.

    `added` is a list to which each addition of the pass appends its tensors; see `MetaForward`.
    """

    def __init__(self, model: nn.Module, added: Sequence[tuple[Tensor, ...]] = ()) -> None:
        self.added = added
        self.times: Counter[str] = Counter()
        self.calls: dict[str, list[ModuleCall]] = {}
        "calls of the modules directly inside a numbered module, such as a layer, in order"
        self.layers: dict[str, ModuleCall] = {}
        "the last call of each numbered module"
        self.idle: set[str] = set()
        "modules that do not run on text, and neither do the modules inside them"
        self._values: dict[Side, SideVerdict] = {}
        self.names = [name for name, _ in model.named_modules() if name]
        handles = [
            h for name, module in model.named_modules() if name for h in self._on(name, module)
        ]
        try:
            probe(model)
        finally:
            for handle in handles:
                handle.remove()
        running = {a for name, times in self.times.items() if times for a in ancestors(name)}
        self.idle = set(self.names) - running

    def verdict(self, hookpoint: str, side: SideName) -> SideVerdict:
        """Whether `Capture` accepts a side."""
        if not is_hookpoint(hookpoint):
            return SideVerdict(None, _ODD_NAME)
        value = self._values.get(Side(hookpoint, side))
        if value is not None and value.reason is not None:
            return value
        if reason := call_count_problem(self.times[hookpoint]):
            is_container = not self.times[hookpoint] and hookpoint not in self.idle
            return SideVerdict(None, _CONTAINER if is_container else reason)
        assert value is not None
        return value

    def adds(self, layer: str, value: object) -> bool:
        """Whether the code of a layer itself, not of a module inside it, adds this tensor."""
        in_modules = {n for call in self.calls[layer] for n in call.additions}
        return any(
            operand is value
            for number in self.layers[layer].additions
            if number not in in_modules
            for operand in self.added[number]
        )

    def _on(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        began = 0

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal began
            began = len(self.added)
            self.times[name] += 1
            self._see(Side(name, "input"), input_of(args, kwargs))

        def after(module: nn.Module, args: Any, kwargs: Any, output: object) -> None:
            value = output_of(output)
            self._see(Side(name, "output"), value)
            parent, _, last = name.rpartition(".")
            call = ModuleCall(name, input_of(args, kwargs), value, range(began, len(self.added)))
            if parent.rpartition(".")[2].isdigit():
                self.calls.setdefault(parent, []).append(call)
            if last.isdigit():
                self.layers[name] = call

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]

    def _see(self, side: Side, value: object) -> None:
        reason = value_problem(value, PROBE)
        width = value.shape[-1] if reason is None and isinstance(value, Tensor) else None
        before = self._values.get(side)
        if before is None or before.reason is None:
            self._values[side] = SideVerdict(width, reason)


def ancestors(name: str) -> list[str]:
    """A module's name and those of the modules around it: a, a.b and a.b.c of a.b.c."""
    segments = name.split(".")
    return [".".join(segments[:count]) for count in range(1, len(segments) + 1)]


def starred(name: str) -> str:
    """A name with * for each number in it."""
    return ".".join("*" if segment.isdigit() else segment for segment in name.split("."))
