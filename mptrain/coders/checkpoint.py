"""Coders on disk: a folder with `coder.json` and `coder.safetensors`; no pickle."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpcache.errors import UsageError
from mptrain.coders.coder import Coder
from mptrain.config.coder_json import coder_config_from_json
from mptrain.config.coder_version_1 import upgrade_description, upgrade_tensor_name
from mptrain.data.atomic_files import json_text, read_json, write_folder

CODER_FORMAT = 2


def save_coder(folder: str | Path, coder: Coder, trained: Mapping[str, Any]) -> None:
    """Write `coder.json` and `coder.safetensors` into a folder, whole or not at all.

    `trained` is kept in the JSON: plain values that tell how the coder was trained.

    Raises:
        OSError: the folder cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from mptrain import Coder, CoderConfig, load_coder, save_coder
        >>> side = ("layers.1:output",)
        >>> config = CoderConfig(inputs=side, targets=side, kind="sae", arch="mp", k=2, expansion=4)
        >>> coder = Coder(config, input_width=8, target_width=8)
        >>> folder = Path(tempfile.mkdtemp()) / "coder"
        >>> save_coder(folder, coder, {"rows": 1000})
        >>> loaded, trained = load_coder(folder)
        >>> loaded.config == config, trained
        (True, {'rows': 1000})
    """
    about = {
        "format": "mptrain-coder",
        "format_version": CODER_FORMAT,
        "config": asdict(coder.config),
        "input_widths": [len(coder.b_D)],
        "target_widths": [len(coder.output_bias_E)],
        "trained": dict(trained),
    }
    if coder.encoder.coded_as != "mp":  # saved before its training switched to a pursuit
        about["coded_as"] = coder.encoder.coded_as
    writers: dict[str, Callable[[Path], object]] = {
        "coder.json": lambda path: path.write_text(json_text(about)),
        "coder.safetensors": partial(save_tensors, coder.state_dict()),
    }
    write_folder(Path(folder), writers)


def load_coder(folder: str | Path) -> tuple[Coder, dict[str, Any]]:
    """Read what `save_coder` wrote: the coder, on the CPU, and how it was trained.

    Files of format version 1 are read too. Example: see `save_coder`.

    Raises:
        UsageError: the folder holds no coder, a damaged one, or one of an unknown format version.
    """
    folder = Path(folder)
    try:
        about = read_json(folder / "coder.json", remedy="train the coder again")
        if about["format_version"] not in (1, CODER_FORMAT):
            raise UsageError(
                f"{folder} has coder format version {about['format_version']}, but this "
                f"version of mptrain reads only 1 and {CODER_FORMAT}; use the version that saved "
                "the coder"
            )
        tensors = load_file(folder / "coder.safetensors")
        if about["format_version"] == 1:
            about = upgrade_description(about)
            tensors = {upgrade_tensor_name(name): tensor for name, tensor in tensors.items()}
        (input_width,), (target_width,) = about["input_widths"], about["target_widths"]
        coder = Coder(coder_config_from_json(about["config"]), input_width, target_width)
        coder.load_state_dict(tensors)
        coder.encoder.coded_as = about.get("coded_as", "mp")
    except FileNotFoundError:
        raise UsageError(f"{folder} holds no coder; give a folder like RUN/coders/NAME") from None
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"the coder in {folder} is damaged: {error}; copy the folder again, or train again"
        ) from None
    return coder, about["trained"]


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as error:  # it gives the system's error in words alone
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
