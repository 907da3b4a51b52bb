"""Folders of the project that tests read."""

from pathlib import Path

PROJECT = Path(__file__).parents[2]
GOLDEN = PROJECT / "tests" / "golden"
