"""A model whose layers are compiled by torch.compile while it reads.

Each child of a layer, its attention, its MLP, its norms, is compiled by itself, whatever is
captured: so hooks stand between what is compiled, and a value has the same bits whichever
hookpoints are collected together. Shapes are static: bits do not depend on which came first.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mpcache.errors import UsageError
from mpcache.model.hookpoint_patterns import Side

BACKEND = "inductor"
_SHAPES = 64  # of batches and kinds of layers; torch would go on without compiling after 8


class CompiledLayers:
    """Compiled forms of a model's layers. Raises UsageError where they do not suit the sides."""

    def __init__(self, model: nn.Module, sides: Sequence[Side]) -> None:
        found = children_of_layers(model)
        if not found:
            raise UsageError(
                f"a model must have its layers in a list to be compiled, got {type(model).__name__}"
                "; leave compile out"
            )
        for side in sides:
            check_outside(side, list(found))
        self._forwards: list[tuple[nn.Module, Any]] = [
            (module, torch.compile(module.forward, backend=BACKEND, dynamic=False))
            for module in found.values()
        ]

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """The model computes with them inside."""
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
    """The modules directly in a layer that have weights, by name; a layer is in a list."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{one}.") for one in lists)]
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
                f"a hookpoint must not lie inside of {name}, which is compiled as one, "
                f"got {side.hookpoint}; leave compile out"
            )
