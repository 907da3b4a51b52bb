"""The saved state of a run on disk: `RUN/state/<step>/state.json` and `state.safetensors`."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mpcache.errors import UsageError
from mptrain.coders.checkpoint import save_tensors
from mptrain.data.atomic_files import json_text, read_json, write_folder
from mptrain.runs.state import RunProgress, RunState


def save_state(run: Path, step: int, state: RunState, tensors: Mapping[str, Tensor]) -> None:
    """Save the state of a run after `step` train steps, then delete the state before it.

    There is a complete state on disk at every moment, once there was one.

    Raises:
        OSError: the disk is full, for example; the state before is kept.
    """
    folder = run / "state" / str(step)
    text = json_text({**state.to_json(), "step": step})
    writers: dict[str, Callable[[Path], object]] = {
        "state.json": lambda path: path.write_text(text),
        "state.safetensors": partial(save_tensors, tensors),
    }
    write_folder(folder, writers)
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other)


def load_state(run: Path) -> tuple[RunState, dict[str, Tensor]] | None:
    """Return the last complete state of a run and its tensors, or None where there is none.

    The run may be under way: a state that a later one replaces while it is read is not damaged.

    Raises:
        UsageError: the state is damaged.
    """
    while (step := last_step(run)) is not None:
        folder = run / "state" / str(step)
        try:
            with _damage_explained(folder):
                return _load_summary(folder), load_file(folder / "state.safetensors")
        except UsageError:
            if last_step(run) == step:
                raise
    return None


def load_progress(run: Path, coders: Sequence[str]) -> RunProgress | None:
    """Return how far a run of the named coders is, or None where no state was saved.

    Raises:
        UsageError: the state is damaged.
    """
    step = last_step(run)
    if step is None:
        return None
    folder = run / "state" / str(step)
    with _damage_explained(folder):
        progress = _load_summary(folder).progress
    has_same_coders = {name for names in progress.passes for name in names} == set(coders)
    return progress if has_same_coders else None  # `check_same_run` says what differs


def last_step(run: Path) -> int | None:
    """Return the train step of the last saved state, or None where there is none."""
    folders = (run / "state").glob("*")
    return max((int(f.name) for f in folders if f.name.isdecimal()), default=None)


def _load_summary(folder: Path) -> RunState:
    remedy = f"delete {folder.parent} to start the run from its beginning"
    return RunState.from_json(read_json(folder / "state.json", remedy=remedy))


@contextmanager
def _damage_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UsageError(
            f"{folder} is damaged, or of another version ({error}); use the version of mptrain "
            f"that wrote it, or delete {folder.parent} to start the run from its beginning"
        ) from None
