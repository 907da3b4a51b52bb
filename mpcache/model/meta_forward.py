"""Runs a model without weights: parameters have shapes only, and results are zeros.

The parameters stay on the meta device, so a model of any size takes no memory. An operation on a
parameter returns zeros on the CPU: real values, so that a model may branch on them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import arg_tree_leaves, tree_map_only

_ADDITIONS = (torch.ops.aten.add, torch.ops.aten.add_)
_META, _CPU = torch.device("meta"), torch.device("cpu")
_VECTOR = 2**16  # parameters up to this size become zeros on the CPU, which is fast enough
_VALUES = 2**22  # results up to this size become zeros on the CPU; larger results stand for weights


def materialize_small_tensors_(model: nn.Module) -> None:
    """Give small parameters and buffers of a model on the meta device zeros on the CPU."""
    for module in model.modules():
        for tensors, limit in ((module._parameters, _VECTOR), (module._buffers, _VALUES)):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.numel() <= limit:
                    zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    new = nn.Parameter(zeros, requires_grad=False) if is_parameter else zeros
                    tensors[name] = new  # type: ignore[assignment]  # of either kind


class MetaForward(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its base has no types
    """Within this context operations on weights return zeros of the right shape at no cost."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.added: list[tuple[Tensor, ...]] = []
        "the tensors of each addition, in order"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in _ADDITIONS:
            self.added.append(tuple(x for x in args[:2] if isinstance(x, Tensor)))
        on_meta = any(isinstance(x, Tensor) and x.is_meta for x in arg_tree_leaves(*args, **kwargs))
        if not on_meta or func.is_view:
            return func(*args, **_with_device(kwargs, _CPU))
        inputs = tree_map_only(Tensor, lambda tensor: tensor.to(_META), (args, kwargs))
        outputs = func(*inputs[0], **_with_device(inputs[1], _META))
        return tree_map_only(Tensor, _zeros, outputs)


def _with_device(kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments with another device, if they name a device."""
    return {**kwargs, "device": device} if kwargs.get("device") is not None else kwargs


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.numel() <= _VALUES else tensor
