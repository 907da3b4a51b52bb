"""The saved state of a run on disk: `RUN/state/<step>/state.json` and `state.safetensors`."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mpcache.errors import UsageError
from mptrain.coders.checkpoint import save_tensors
from mptrain.data.atomic_files import json_text, read_json, write_folder


def save_state(
    run: Path, step: int, about: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Keep the state of a run after `step` train steps, then drop the state before it.

    At every moment a whole state is there, once there was one. An OSError leaves that one.
    """
    folder = run / "state" / str(step)
    writers: dict[str, Callable[[Path], object]] = {
        "state.json": lambda path: path.write_text(json_text({**about, "step": step})),
        "state.safetensors": partial(save_tensors, tensors),
    }
    write_folder(folder, writers)
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
