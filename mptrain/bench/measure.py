"""Seconds and bytes of a call, measured alike for every method.

B rows in a batch, M latents, K pursuit steps.
"""

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

CodeTensors = Tensor | tuple[Tensor, Tensor]  # dense `code_BM`, or `idx_BK` and `val_BK`
Progress = Callable[[str], None]
"is called with a line of text before each step of a measurement"


@dataclass(frozen=True, kw_only=True)
class CodingMethod:
    """A method to code rows: one of our coders, or another tool's."""

    name: str
    encode: Callable[[Tensor], CodeTensors | None]
    loss: Callable[[Tensor], Tensor] | None
    "training loss of a batch; None: the method cannot be trained"
    parameters: tuple[Tensor, ...]
    is_pursuit: bool
    "whether its codes are a pursuit over the dictionary, comparable with those of `direct`"


def silent(_: str) -> None:
    """Report no progress."""


def time_calls(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    progress: Progress = silent,
) -> dict[str, list[float]]:
    """Seconds of each call in each of `repeats` rounds, after one round that only warms up.

    Every round runs all calls in turn, so that a slow phase of the machine meets all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            progress(f"round {number + 1} of {repeats + 1}: {name}")
            _synchronise(device)
            start = time.perf_counter()
            call()
            _synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: all_rounds[1:] for name, all_rounds in seconds.items()}


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Median over the rounds of a call's seconds divided by another call's in the same round."""
    return median(a / b for a, b in zip(seconds, others, strict=True))


def saved_bytes(loss: Callable[[], Tensor], excluded: Iterable[Tensor]) -> int:
    """Bytes that computing a loss keeps for its backward pass, without those of `excluded`."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = loss()
    # looked up after the forward pass, which may have moved its parameters
    excluded_pointers = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    del graph
    return sum(size for pointer, size in kept.items() if pointer not in excluded_pointers)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory during a call, above the memory in use before it; None where unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    _return_free_memory()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # resets the peak to the memory in use
    except OSError:
        return None
    before = _kilobytes(status.read_text(), "VmRSS")
    call()
    return 1024 * (_kilobytes(status.read_text(), "VmHWM") - before)


def _return_free_memory() -> None:
    """Return freed memory to the OS: memory kept from earlier calls would hide the next peak."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _kilobytes(status: str, name: str) -> int:
    return int(status.split(f"{name}:")[1].split()[0])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
