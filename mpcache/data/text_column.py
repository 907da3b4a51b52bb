"""The column with the documents, or a field nested in a column, such as `meta.text`."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from mpcache.config import CollectConfig
from mpcache.errors import UsageError

MASK = "attention_mask"  # the column beside token ids; tokens with mask 0 are left out
NO_MASK: Any = object()
"stands for a missing mask field; a null in the field is an invalid mask"
_LISTED = 20  # columns that a message names

Path = tuple[str, ...]
Tree = Mapping[str, Any]


def tree_of(fields: pa.Schema | pa.StructType) -> dict[str, Any]:
    """The columns of an arrow table, with the fields of each struct below it.

    Raises KeyError with the name if two columns share it.
    """
    tree: dict[str, Any] = {}
    for field in fields:
        if field.name in tree:
            raise KeyError(field.name)
        is_struct = pa.types.is_struct(field.type)
        tree[field.name] = tree_of(field.type) if is_struct else ""
    return tree


def column_path(tree: Tree, config: CollectConfig, name: str) -> Path:
    """The path of `text_column`: a column of exactly that name, or else a field of a struct.

    `name` is the file. Raises UsageError with the columns of the file.
    """
    wanted = config.text_column
    if wanted in tree:
        return (wanted,)
    path, node = tuple(wanted.split(".")), tree
    for step in path:
        if node is None:  # the fields of a null struct are not known
            break
        if not isinstance(node, Mapping) or step not in node:
            columns = list(dotted_paths(tree))
            more = f" and {len(columns) - _LISTED} more" if len(columns) > _LISTED else ""
            raise UsageError(
                f"text_column must be a column of {name}, got {wanted}; "
                f"use one of {', '.join(columns[:_LISTED])}{more}"
            )
        node = node[step]
    return path


def dotted_paths(tree: Tree, prefix: str = "") -> Iterator[str]:
    """The paths of all columns and nested fields, written as for `--text-column`."""
    for name, below in tree.items():
        if isinstance(below, Mapping) and below:
            yield from dotted_paths(below, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def mask_path(path: Path) -> Path:
    """The path of the attention mask of a column of token ids."""
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
    """The mask of a row of token ids; NO_MASK if the row has no such field."""
    try:
        return value_at(row, mask_path(path))
    except KeyError:
        return NO_MASK


def array_at(batch: pa.RecordBatch, path: Path) -> pa.Array:
    """The values of a batch at a path; null below a null struct."""
    array = batch.column(path[0])
    for step in path[1:]:
        index = array.type.get_field_index(step)
        array = array.flatten()[index]  # a field of a null struct becomes null
    return array
