"""What a config's dataclasses say of their fields: the literal under each one, and its group."""

import ast
import dataclasses
import functools
import inspect
import sys
import types

from mpcli.option_groups import DEFAULT_GROUP


def field_docs(config_type: type) -> dict[str, str]:
    """The literal under each field of a dataclass: its own fields first, then inherited ones."""
    docs: dict[str, str] = {}
    for cls in filter(dataclasses.is_dataclass, config_type.__mro__):
        docs = {**docs, **{n: doc for n, doc in _own_docs(cls).items() if n not in docs}}
    return docs


def field_groups(config_type: type) -> dict[str, str]:
    """The group of each field: the `group` of the class that defines it."""
    groups: dict[str, str] = {}
    for cls in filter(dataclasses.is_dataclass, config_type.__mro__):
        for name in _own_docs(cls):
            groups.setdefault(name, cls.__dict__.get("group", DEFAULT_GROUP))
    return groups


def _own_docs(config_type: type) -> dict[str, str]:
    """The literal under each field that this very class defines."""
    definition = _classes(sys.modules[config_type.__module__])[config_type.__name__]
    docs = {}
    for field, doc in zip(definition.body, definition.body[1:], strict=False):
        match field, doc:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                value=ast.Constant(value=str(text))
            ):
                docs[name] = text
    return docs


@functools.cache
def _classes(module: types.ModuleType) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(module))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
