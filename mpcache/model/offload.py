"""Copies from a GPU to host memory, beside its computation."""

from collections.abc import Callable

import torch
from torch import Tensor


class HostTransfer:
    """Copies values on a stream of their own into page-locked memory, which torch keeps for reuse.

    Values are cast and copied on the GPU first, in the order of its computation: fewer bytes cross,
    and what the model does next changes none of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, values: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        """What it gives waits for the copy."""
        ours = values.to(dtype, copy=True, memory_format=torch.contiguous_format)
        host = torch.empty(ours.shape, dtype=dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(self._stream):
            host.copy_(ours, non_blocking=True)
        ours.record_stream(self._stream)  # until then its memory is nobody else's
        done = self._stream.record_event()

        def arrived() -> Tensor:
            done.synchronize()
            return host

        return arrived
