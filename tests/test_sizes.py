"""Modules, classes and functions stay short; a module of tests is as long as its subject asks."""

import ast
from collections.abc import Iterator

import pytest

from tests.helpers.paths import PROJECT

MODULE, CLASS, FUNCTION = 400, 150, 50
WHOLE_MODULE = "module"
FOLDERS = ("mpcache", "mptrain", "cli", "benchmarks", "data", "tests")


def long_parts(source: str) -> Iterator[tuple[str, int]]:
    """Names and lengths of what is too long; a docstring does not count for a function."""
    if (lines := len(source.splitlines())) > MODULE:
        yield WHOLE_MODULE, lines
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            lines, limit = _lines(node), CLASS
        elif isinstance(node, ast.FunctionDef) and not _is_kernel(node):
            has_docstring = ast.get_docstring(node) is not None
            lines = _lines(node) - (_lines(node.body[0]) if has_docstring else 0)
            limit = FUNCTION
        else:
            continue
        if lines > limit:
            yield node.name, lines


def _lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def _is_kernel(function: ast.FunctionDef) -> bool:
    """A GPU kernel keeps its values in registers, which a call of another kernel would end."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_code_is_short() -> None:
    files = [path for folder in FOLDERS for path in sorted((PROJECT / folder).rglob("*.py"))]
    assert len(files) > 400
    too_long = {
        f"{path.relative_to(PROJECT)}: {name}": lines
        for path in files
        for name, lines in long_parts(path.read_text())
        if not (name == WHOLE_MODULE and PROJECT / "tests" in path.parents)
    }
    assert not too_long


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\n" * 401, [(WHOLE_MODULE, 401)]),
        ("class A:\n" + "    x = 1\n" * 150, [("A", 151)]),
        ("def f():\n" + "    x = 1\n" * 50, [("f", 51)]),
        ('def f():\n    """A.\n\n    B.\n    """\n' + "    x = 1\n" * 49, []),
        ("@triton.jit\ndef f():\n" + "    x = 1\n" * 60, []),
    ],
)
def test_long_parts_are_named(source: str, expected: list[tuple[str, int]]) -> None:
    assert list(long_parts(source)) == expected
