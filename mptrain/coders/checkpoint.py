"""Coders and run states on disk: JSON and safetensors, written aside and renamed; no pickle."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpcache.errors import UsageError
from mptrain.coders.coder import Coder
from mptrain.config.coder import CoderConfig

CODER_FORMAT = 1
_PARTIAL = ".partial"


def save_coder(folder: Path, coder: Coder, more: Mapping[str, Any]) -> None:
    """Write `coder.json` and `coder.safetensors`; `more` is kept in the JSON under `trained`."""
    about = {
        "format": "mptrain-coder",
        "format_version": CODER_FORMAT,
        "config": asdict(coder.config),
        "input_width": len(coder.b_D),
        "target_width": len(coder.output_bias_E),
        "trained": dict(more),
    }
    if coder.coded_as != "mp":  # saved before its training switched to a pursuit
        about["coded_as"] = coder.coded_as
    tensors = coder.state_dict()
    _write_folder(folder, {"coder.json": about}, {"coder.safetensors": tensors})


def load_coder(folder: Path) -> tuple[Coder, dict[str, Any]]:
    """Read what `save_coder` wrote: the coder, on the CPU, and how it was trained.

    Raises:
        ValueError: the folder holds no coder, a damaged one, or one of an unknown format version.
    """
    try:
        about = read_json(folder / "coder.json", remedy="train the coder again")
        if about["format_version"] != CODER_FORMAT:
            raise UsageError(
                f"{folder} has coder format {about['format_version']}, this mptrain reads "
                f"{CODER_FORMAT}; use the mptrain that made it"
            )
        coder = Coder(CoderConfig(**about["config"]), about["input_width"], about["target_width"])
        coder.load_state_dict(load_file(folder / "coder.safetensors"))
        coder.coded_as = about.get("coded_as", "mp")
    except FileNotFoundError:
        raise UsageError(f"{folder} holds no coder; name a folder like RUN/coders/NAME") from None
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"{folder} holds a damaged coder: {error}; copy it again, or train it again"
        ) from None
    return coder, about["trained"]


def save_state(
    run: Path, step: int, about: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Keep the state of a run after `step` train steps, then drop the state before it.

    At every moment a whole state is there, once there was one. An OSError leaves that one.
    """
    folder = run / "state" / str(step)
    _write_folder(folder, {"state.json": {**about, "step": step}}, {"state.safetensors": tensors})
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other)


def load_state(run: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The last state that was kept whole; None where there is none.

    The run may be under way: where a later state takes the place of this one, that one is read.

    Raises:
        ValueError: its bytes are not what was kept.
    """
    while (step := last_step(run)) is not None:
        folder = run / "state" / str(step)
        try:
            with _damage_in_words(folder):
                return _about(folder), load_file(folder / "state.safetensors")
        except ValueError:
            if last_step(run) == step:
                raise
    return None


def load_about(run: Path) -> dict[str, Any] | None:
    """What `load_state` gives, without its tensors."""
    step = last_step(run)
    if step is None:
        return None
    folder = run / "state" / str(step)
    with _damage_in_words(folder):
        return _about(folder)


def last_step(run: Path) -> int | None:
    """The train step after which the last whole state was kept; None where there is none."""
    states = (run / "state").glob("*")
    return max((int(f.name) for f in states if f.name.isdecimal()), default=None)


def is_partial(path: Path) -> bool:
    """Whether a write that was cut short left this behind."""
    return path.name.endswith(_PARTIAL)


def read_json(path: Path, *, remedy: str = "remove this file") -> Any:
    """What a JSON file holds. ValueError, with the remedy: it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is damaged: it is not JSON ({error}); copy it again, or {remedy}"
        ) from None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + _PARTIAL)
    partial.write_text(_json(content))
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _about(state: Path) -> dict[str, Any]:
    about: dict[str, Any] = read_json(
        state / "state.json", remedy=f"delete {state.parent}: the run starts from its beginning"
    )
    return about


@contextmanager
def _damage_in_words(state: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ValueError, SafetensorError) as error:
        raise UsageError(
            f"{state} is damaged ({error}); delete {state.parent}, and the run starts anew"
        ) from None


def _write_folder(
    folder: Path, texts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Make a folder under a temporary name, sync it, and rename it into place."""
    partial = folder.with_name(folder.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _fill(partial, texts, tensors)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its room back
        raise
    if folder.exists():  # only a coder, with the same weights: whole at every moment
        for name in (*tensors, *texts):
            (partial / name).replace(folder / name)
        partial.rmdir()
    else:
        partial.rename(folder)
    _sync(folder.parent)


def _fill(
    folder: Path, texts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    folder.mkdir(parents=True)
    for name, content in texts.items():
        (folder / name).write_text(_json(content))
        _sync(folder / name)
    for name, named in tensors.items():
        _save_tensors(folder / name, named)
        _sync(folder / name)
    _sync(folder)  # the names of its files, before its own


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as error:  # it gives the system's error in words alone
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
