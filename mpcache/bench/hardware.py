"""A description of the machine, for reports of measurements."""

import os
import platform
from pathlib import Path

import torch

_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # these decide matrix products


def hardware(device: torch.device) -> str:
    """The name of the device, and what computes on it."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return f"{_cpu()}, {cores} cores, threads used: {threads}, torch {torch.__version__}"


def _cpu() -> str:
    """The CPU's name and features, where the system is Linux."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    values = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    flags = values.get("flags", "").split()
    features = " ".join(f for f in _FEATURES if f in flags) or "flags unknown"
    return f"{values.get('model name') or platform.machine()} ({features})"
