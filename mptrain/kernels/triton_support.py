"""Whether the Triton kernels can be used. Their modules import Triton, so ask here first."""

import importlib.util
import warnings
from functools import cache

import torch


def available(device: torch.device) -> bool:
    """Whether kernels run on `device`: on NVIDIA GPUs from Ampere on, where Triton is installed.

    On a CPU they run in Triton's interpreter alone, far too slowly for any use but their own tests,
    which call them directly. Warns once where a GPU has to do without.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if importlib.util.find_spec("triton") is None:
        _warn_once()
        return False
    return True


@cache
def _warn_once() -> None:
    warnings.warn(
        "Triton is not installed: matching pursuit falls back to plain torch, which is slower on a "
        "GPU; run pip install triton, in the version that your torch asks for",
        stacklevel=3,
    )
