"""Files of a store on a local or shared file system: written whole, synced, found again.

Zarr's LocalStore renames atomically but does not sync, so a power cut can leave a renamed but empty
file; every object is therefore synced here, with its folders, before anything vouches for it.
"""

import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

_PIECE = 1 << 20
_TEMPORARY = ".partial"  # the suffix of Zarr's own temporary files, so one rule finds both


def put_new(path: Path, data: bytes) -> bool:
    """Write a file that must not exist yet, all or nothing; False if somebody else's is there."""
    return create(path, [data])


def create(path: Path, pieces: Iterable[bytes]) -> bool:
    """As `put_new`; pieces of a megabyte or so are best.

    On ext4, syncing a file that came in one large write took ten times the processor time.
    """
    if path.exists():  # spares a write, also where nothing can be written; the link decides
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _write_temporary(path, pieces)
    try:
        os.link(temporary, path)  # unlike a rename, fails where the name is taken
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    _sync_folder(path.parent)
    return True


def replace(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file over what is there, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_temporary(path, pieces).replace(path)
    _sync_folder(path.parent)


def _write_temporary(path: Path, pieces: Iterable[bytes]) -> Path:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{_TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(path)  # a full disk does not say where
        raise
    return temporary


def sync_folders(folder: Path, top: Path) -> None:
    """Force the entries of a folder, and of those between it and `top`, to the disk."""
    _sync_folder(folder)
    if folder != top:
        sync_folders(folder.parent, top)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_file(path: Path) -> str:
    """XXH3 of a file's bytes, 128 bits in hexadecimal. Tells damage, not forgery, at disk speed."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def is_temporary(path: Path) -> bool:
    """Whether a file is the rest of an interrupted write, of ours or of Zarr's."""
    return path.name.endswith(_TEMPORARY)


def files_below(top: Path) -> Iterator[Path]:
    """All files of a folder and its subfolders, in a stable order; none if there is no folder."""
    for folder, subfolders, names in os.walk(top):
        subfolders.sort()
        for name in sorted(names):
            yield Path(folder, name)
