"""Compiles the modules of each layer with torch.compile.

Each child of a layer (attention, MLP, norms) is compiled separately, whatever is captured. Hooks
run between the compiled modules, so a value has the same bits whichever hookpoints are collected
together. Shapes are static, so bits do not depend on the shape that came first.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mpcache.errors import UsageError
from mpcache.model.hookpoint_patterns import Side

BACKEND = "inductor"
_SHAPES = 64  # shapes of batches times kinds of layers; torch would stop compiling after 8


class CompiledLayers:
    """A model's layers in compiled form. Raises UsageError for a side inside a compiled module."""

    def __init__(self, model: nn.Module, sides: Sequence[Side]) -> None:
        modules = children_of_layers(model)
        if not modules:
            raise UsageError(
                "--compile needs a model whose layers are in a list, got "
                f"{type(model).__name__}; remove --compile"
            )
        for side in sides:
            check_outside(side, list(modules))
        self._forwards: list[tuple[nn.Module, Any]] = [
            (module, torch.compile(module.forward, backend=BACKEND, dynamic=False))
            for module in modules.values()
        ]

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within this context the model runs its compiled modules."""
        from torch._dynamo import config

        limits = {"recompile_limit": _SHAPES, "fail_on_recompile_limit_hit": True}
        try:
            for module, forward in self._forwards:
                module.forward = forward
            with config.patch(limits):
                yield
        finally:
            for module, _ in self._forwards:
                vars(module).pop("forward", None)


def children_of_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The direct children of layers that have weights, by name. Layers are items of a list."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return {
        f"{name}.{number}.{child}": module
        for name in outer
        for number, layer in model.get_submodule(name).named_children()
        for child, module in layer.named_children()
        if not isinstance(module, nn.ModuleList | nn.ModuleDict) and [*module.parameters()]
    }


def check_outside(side: Side, compiled: Sequence[str]) -> None:
    for name in compiled:
        if side.hookpoint.startswith(f"{name}."):
            raise UsageError(
                f"--compile compiles {name} as one module, so no hookpoint may lie inside it, "
                f"got {side.hookpoint}; remove --compile"
            )
