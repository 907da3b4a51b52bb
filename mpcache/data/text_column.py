"""Where the documents are in a row: a column, or a field of one to any depth, as `meta.text`."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from mpcache.config import CollectConfig
from mpcache.errors import UsageError

MASK = "attention_mask"  # beside a column of token ids: tokens of mask 0 are left out
NO_MASK: Any = object()
"in place of a mask where a row has no such field; a null is a mask that is wrong"
_LISTED = 20

Path = tuple[str, ...]
Tree = Mapping[str, Any]


def tree_of(fields: pa.Schema | pa.StructType) -> dict[str, Any]:
    """The names of an arrow table's columns, and below a struct those of its fields.

    Raises KeyError with a name that two columns have.
    """
    tree: dict[str, Any] = {}
    for field in fields:
        if field.name in tree:
            raise KeyError(field.name)
        is_struct = pa.types.is_struct(field.type)
        tree[field.name] = tree_of(field.type) if is_struct else ""
    return tree


def path_in(tree: Tree, config: CollectConfig, name: str) -> Path:
    """The path of `text_column`: a column of that very name, else a field of a struct.

    Raises UsageError with the columns that there are in `name`.
    """
    wanted = config.text_column
    if wanted in tree:
        return (wanted,)
    path, node = tuple(wanted.split(".")), tree
    for step in path:
        if node is None:  # a null struct has fields that are not known
            break
        if not isinstance(node, Mapping) or step not in node:
            columns = list(dotted(tree))
            more = f" and {len(columns) - _LISTED} more" if len(columns) > _LISTED else ""
            raise UsageError(
                f"text_column must be a column of {name}, got {wanted}; "
                f"use one of {', '.join(columns[:_LISTED])}{more}"
            )
        node = node[step]
    return path


def dotted(tree: Tree, prefix: str = "") -> Iterator[str]:
    """The paths of all columns as `--text-column` takes them."""
    for name, below in tree.items():
        if isinstance(below, Mapping) and below:
            yield from dotted(below, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def mask_beside(path: Path) -> Path:
    """The path of the attention mask that belongs to a column of token ids."""
    return (*path[:-1], MASK)


def value_at(row: Tree, path: Path) -> Any:
    """The value at a path; None below a null. Raises KeyError where a row lacks the field."""
    value: Any = row
    for step in path:
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise KeyError(step)
        value = value[step]
    return value


def mask_of(row: Tree, path: Path) -> Any:
    """The mask that a row has beside its value, if it has the field."""
    try:
        return value_at(row, mask_beside(path))
    except KeyError:
        return NO_MASK


def array_at(batch: pa.RecordBatch, path: Path) -> pa.Array:
    """The values of a batch at a path; null below a null struct."""
    array = batch.column(path[0])
    for step in path[1:]:
        index = array.type.get_field_index(step)
        array = array.flatten()[index]  # takes the nulls of the struct along
    return array
