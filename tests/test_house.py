"""House rules that no linter knows."""

from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
MODULES = [f for p in ("mpcache", "mptrain", "cli") for f in sorted((PROJECT / p).rglob("*.py"))]


@pytest.mark.parametrize("file", MODULES, ids=lambda f: f.relative_to(PROJECT).as_posix())
def test_a_module_is_one_stage(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400
