"""DATASET -> the paths of its files, in order: a file, a folder, a glob, or a list of these.

Files of a folder or a glob are sorted by name, and numbers in names by value. Files without data,
such as a README, are left out. An ambiguous name is an error.
"""

import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mpcache.config import CollectConfig
from mpcache.data.digested_file import COMPRESSIONS
from mpcache.data.files_of_split import check_shards_complete, files_of_split
from mpcache.errors import UsageError
from mpcache.hub_errors import looks_like_path
from mpcache.natural_sort import natural_path_key
from mpcache.untrusted_names import user_path

FileKind = Literal["json", "csv", "parquet", "arrow", "text", "bin"]
KINDS: dict[str, FileKind] = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".bin": "bin",
}
LOCAL_SUFFIXES = (*KINDS, *COMPRESSIONS)
_FORMATS = ".jsonl, .json, .csv, .parquet, .arrow, .txt or .bin, also with .gz or .zst"

# files beside the data in downloads and in what other programs write
_OTHER_NAMES = {
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json",
    "croissant.json", "requirements.txt",
}  # fmt: skip
_OTHER_STEMS = ("readme", "license", "licence", "notice", "changelog", "citation")
# data in formats that are not read: leaving these out silently would read half a dataset
_UNREADABLE = {
    ".7z", ".avro", ".bz2", ".crdownload", ".feather", ".h5", ".hdf5", ".idx", ".incomplete",
    ".lz4", ".msgpack", ".npy", ".npz", ".orc", ".part", ".rar", ".sz", ".tar", ".tgz", ".tmp",
    ".tsv", ".xml", ".xz", ".zip",
}  # fmt: skip
_GLOB = set("*?[")


@dataclass(frozen=True)
class DatasetFiles:
    """The files of a dataset, in order."""

    label: str
    "name of the dataset without its parent folder"
    kind: FileKind
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    "names of the files for messages"
    form: Literal["file", "several", "text folder", "arrow folder"]


def find_dataset_files(config: CollectConfig) -> DatasetFiles | None:
    """The files that DATASET names; None for a dataset id of the Hub."""
    dataset = config.dataset
    path = user_path(dataset)
    if os.path.isdir(path):  # a list can be longer than a path may be: Path's own would raise
        return _of_folder(path, config)
    if os.path.lexists(path):
        return DatasetFiles(path.name, _kind(path), (path,), (path.name,), "file")
    if "," in dataset or _GLOB & set(dataset):
        return _of_several(dataset, config)
    if path.name.lower().endswith(LOCAL_SUFFIXES) or looks_like_path(dataset):
        raise UsageError(f"the dataset {dataset} does not exist; correct --dataset")
    return None


def suffix_of(path: Path) -> str:
    """The suffix that tells the kind of a file: that before .gz or .zst."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def _kind(path: Path) -> FileKind:
    if (suffix := suffix_of(path)) not in KINDS:
        raise UsageError(
            f"a local dataset must be a folder or a file that ends in {_FORMATS}, got "
            f"{path.name}; convert "
            "the file to one of these formats"
        )
    return KINDS[suffix]


# --- several files ---


def _of_folder(path: Path, config: CollectConfig) -> DatasetFiles:
    folder = _split_folder(path, config.split)
    label = folder.name or path.resolve().name
    if (folder / "state.json").exists():
        files = arrow_files(folder)
        names = tuple(f"{label}/{file.name}" for file in files)
        return DatasetFiles(label, "arrow", files, names, "arrow folder")
    files = _data_files(folder)
    if {KINDS[suffix_of(file)] for file in files} == {"text"} and not _compressed(files):
        files = _text_files(folder, files)
        names = tuple(file.relative_to(folder).as_posix() for file in files)
        return DatasetFiles(label, "text", files, names, "text folder")
    if not files:
        raise UsageError(
            f"a dataset folder must hold files that end in {_FORMATS}, or come from "
            f"save_to_disk, got {label} "
            "with neither; give another folder with --dataset"
        )
    kind = _common_kind(files, label)
    files = files_of_split(files, folder, config.split)
    check_shards_complete(files, folder)
    names = tuple(f"{label}/{file.relative_to(folder).as_posix()}" for file in files)
    return DatasetFiles(label, kind, files, names, "several")


def _of_several(dataset: str, config: CollectConfig) -> DatasetFiles:
    """A glob, or files, folders and globs with commas between them."""
    files: list[Path] = []
    for item in filter(None, map(str.strip, dataset.split(","))):
        files += _of_item(item, config)
    if repeated := [file for file, count in Counter(files).items() if count > 1]:
        raise UsageError(
            f"dataset must name each file once, got {repeated[0]} twice; remove one of the two "
            "names"
        )
    label = ",".join(Path(item.strip()).name for item in dataset.split(",") if item.strip())
    names = tuple(map(str, files))
    return DatasetFiles(label, _common_kind(files, label), tuple(files), names, "several")


def _of_item(item: str, config: CollectConfig) -> Sequence[Path]:
    path = user_path(item)
    if os.path.isdir(path):
        return _of_folder(path, config).paths
    if os.path.lexists(path):
        _kind(path)
        return [path]
    if not _GLOB & set(item):
        raise UsageError(f"the dataset {item} does not exist; correct --dataset")
    matches = sorted(map(Path, glob.glob(str(path), recursive=True)), key=natural_path_key)
    files = [file for file in matches if not file.is_dir() and is_data(file)]
    if not files:
        raise UsageError(
            f"dataset must match a file that ends in {_FORMATS}, got {item}, which matches "
            "none; correct the "
            "pattern"
        )
    return files


def _data_files(folder: Path) -> tuple[Path, ...]:
    """All files with data below a folder, through links to files and folders as well."""
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = sorted(name for name in folders if name[0] != "." and real not in seen)
        if real not in seen:
            files += [file for name in names if is_data(file := Path(parent, name))]
        seen.add(real)
    return tuple(sorted(files, key=lambda file: natural_path_key(file.relative_to(folder))))


def _text_files(folder: Path, data: Sequence[Path]) -> tuple[Path, ...]:
    """All texts of a folder in plain alphabetical order, hidden files included.

    Older stores were made from exactly these files in this order, so it must not change. Files in
    `data` alone, such as `.TXT` files and files behind a link to a folder, are added.
    """
    texts = [file for file in folder.rglob("*.txt") if not file.is_dir()]
    known = set(map(os.path.realpath, texts))
    others = [file for file in data if os.path.realpath(file) not in known]
    return tuple(sorted([*texts, *others]))


def _refuse_folder(error: OSError) -> None:
    """Raise UsageError for an unreadable folder, which `os.walk` would silently skip."""
    name = Path(error.filename).name
    raise UsageError(
        f"the folder {name} cannot be read: {error.strerror}; make it readable, or select the "
        "files to read with a glob or a list with commas in --dataset"
    ) from error


def is_data(file: Path) -> bool:
    """Whether to read a file. Raises UsageError for data in a format that is not read."""
    name, suffix = file.name.lower(), suffix_of(file)
    if name[0] == "." or name in _OTHER_NAMES or name.split(".")[0] in _OTHER_STEMS:
        return False
    if file.suffix.lower() in _UNREADABLE or suffix in _UNREADABLE:
        raise UsageError(
            f"{file.name} in the dataset's folder does not end in {_FORMATS}; convert the "
            "file, or select "
            "the files to read with a glob or a list with commas in --dataset"
        )
    return suffix in KINDS


def _common_kind(files: Iterable[Path], label: str) -> FileKind:
    suffixes = tuple(dict.fromkeys(map(suffix_of, files)))
    if len(suffixes) > 1:
        raise UsageError(
            f"dataset must hold files of one kind, got {' and '.join(suffixes)} in {label}; "
            f"select the files to read with a glob, such as {label}/*{suffixes[0]}"
        )
    plain = {str(file): file.name for file in files if not _compressed([file])}
    for file in _compressed(files):
        if str(file.with_suffix("")) in plain:
            raise UsageError(
                f"dataset must hold each file once, got both {file.name} and {file.stem}; remove "
                "one of the two, or select the files to read with a glob"
            )
    return KINDS[suffixes[0]]


def _compressed(files: Iterable[Path]) -> list[Path]:
    return [file for file in files if file.suffix.lower() in COMPRESSIONS]


# --- folders of save_to_disk ---


def _split_folder(path: Path, split: str) -> Path:
    """The folder of one split, where `path` is an arrow folder that holds several."""
    if not (path / "dataset_dict.json").exists():
        return path
    splits = _json_of(path / "dataset_dict.json", "splits")
    if split not in splits:
        raise UsageError(
            f"split must be one of {', '.join(splits)} in {path.name}, got {split}; give one of "
            "these with --split"
        )
    if not os.path.isdir(path / split):
        raise UsageError(
            f"{path.name} has no folder {split}, although it lists that split; save the dataset "
            "again with save_to_disk"
        )
    return path / split


def arrow_files(path: Path) -> tuple[Path, ...]:
    """The files of a table that `save_to_disk` wrote, without the caches that `datasets` adds."""
    files = _json_of(path / "state.json", "_data_files")
    try:
        return tuple(path / file["filename"] for file in files)
    except (TypeError, KeyError) as error:
        raise UsageError(
            f"{path.name}/state.json does not list the data files; save the dataset again with "
            "save_to_disk"
        ) from error


def _json_of(file: Path, key: str) -> list[Any]:
    try:
        content = json.loads(file.read_bytes())[key]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{file.parent.name}/{file.name} must be JSON with the field {key}; save the dataset "
            "again with save_to_disk"
        ) from error
    if not isinstance(content, list):
        raise UsageError(
            f"{key} in {file.parent.name}/{file.name} must be a list; save the dataset again "
            "with save_to_disk"
        )
    return content
