"""The machines that each run of a sweep was trained on: a run may continue on another machine."""

from collections.abc import Iterable
from pathlib import Path

from mptrain.data.atomic_files import read_json, write_json


def log_hardware(folder: Path, run: str, hardware: str) -> None:
    """Record that a run is trained on this machine."""
    machines = _read_log(folder)
    if hardware not in machines.setdefault(run, []):
        machines[run].append(hardware)
    write_json(_log_file(folder), machines)


def hardware_of(folder: Path, runs: Iterable[str]) -> list[str]:
    """The machines of these runs, each once."""
    machines = _read_log(folder)
    return list(dict.fromkeys(name for run in sorted(runs) for name in machines.get(run, ())))


def _log_file(folder: Path) -> Path:
    return folder / "hardware.json"


def _read_log(folder: Path) -> dict[str, list[str]]:
    file = _log_file(folder)
    machines: dict[str, list[str]] = read_json(file) if file.exists() else {}
    return machines
