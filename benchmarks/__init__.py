"""Comparisons with other tools; not a part of the wheel. Each module is a command with `--help`."""
