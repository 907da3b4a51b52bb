"""Seconds and bytes of a call, measured in the same way whoever wrote what is called.

B rows in a batch, M latents, K pursuit steps.
"""

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Codes = Tensor | tuple[Tensor, Tensor]  # dense `code_BM`, or `idx_BK` and `val_BK`


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to code rows: one of ours, or another tool's."""

    name: str
    encode: Callable[[Tensor], Codes | None]
    loss: Callable[[Tensor], Tensor] | None
    "what it is trained on; None: it cannot be"
    parameters: tuple[Tensor, ...]
    pursues: bool
    "whether its codes are a pursuit over the dictionary, to compare with those of direct"


def seconds(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call, all of them in turn; a first round only warms up."""
    of_call: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            _synchronise(device)
            began = time.perf_counter()
            call()
            _synchronise(device)
            of_call[name].append(time.perf_counter() - began)
    return {name: all_of[1:] for name, all_of in of_call.items()}


def saved_bytes(loss: Callable[[], Tensor], excluded: Iterable[Tensor]) -> int:
    """Bytes that computing a loss leaves for its backward pass, without those of `excluded`."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = loss()
    # asked for afterwards: a forward pass may have moved its parameters
    given = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    del graph
    return sum(size for storage, size in kept.items() if storage not in given)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most memory in use during a call, above what was in use before; None where unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    _return_free_memory()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # the peak starts again from what is in use
    except OSError:
        return None
    before = _kilobytes(status.read_text(), "VmRSS")
    call()
    return 1024 * (_kilobytes(status.read_text(), "VmHWM") - before)


def _return_free_memory() -> None:
    """What the allocator holds from earlier calls would hide what the next one needs."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _kilobytes(status: str, name: str) -> int:
    return int(status.split(f"{name}:")[1].split()[0])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
