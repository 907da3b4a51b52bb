"""Copies values from a GPU to host memory while the GPU computes."""

from collections.abc import Callable

import torch
from torch import Tensor


class HostTransfer:
    """Copies on a separate CUDA stream into page-locked memory, which torch keeps for reuse.

    Values are first cast and copied on the GPU, in the order of its computation. So fewer bytes
    cross the bus, and later in-place operations of the model do not change them.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, values: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        """Start a copy. The returned function waits for it and returns the copy."""
        copied = values.to(dtype, copy=True, memory_format=torch.contiguous_format)
        host = torch.empty(copied.shape, dtype=dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(self._stream):
            host.copy_(copied, non_blocking=True)
        copied.record_stream(self._stream)  # keeps its memory until the copy is done
        done = self._stream.record_event()

        def wait() -> Tensor:
            done.synchronize()
            return host

        return wait
