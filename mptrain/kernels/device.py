"""The torch device that a command runs on."""

import torch

from mpcache.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """Return the named device; `auto` is the current GPU if there is one, else the CPU.

    A GPU always has its number, because "the current GPU" differs between threads.

    Raises:
        ValueError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.zeros((), device=device).item()  # a valid name may be of an absent device
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"device {name!r} is not available on this machine ({reason}); use --device auto or cpu"
        ) from None
    return device
