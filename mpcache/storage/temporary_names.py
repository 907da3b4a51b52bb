"""Temporary names of objects."""

_TEMPORARY = ".partial"  # the suffix of Zarr's own temporary files, so one rule finds both


def temporary_name(name: str, key: str) -> str:
    """A temporary name beside `name`."""
    return f"{name}.{key}{_TEMPORARY}"


def is_temporary(name: str) -> bool:
    """Whether an object is the leftover of an interrupted write, of ours or of Zarr's."""
    return name.endswith(_TEMPORARY)
