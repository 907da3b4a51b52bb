"""Plant small faults in a copy of the code, one at a time: some test must turn red for each.

`make faults` tries all of `faults.toml`, `make faults ONLY='bias reset'` those whose names contain
one of the words. A fault that no test finds asks for a missing test. A fault whose text is not in
its file exactly once asks for an update of `faults.toml`.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
COPIED = ("mpcache", "mptrain", "cli", "tests", "data", "docs", "pyproject.toml", "README.md")
SECONDS = 900  # for the tests of one fault
_OPTIONS = (
    "-xq", "-p", "no:cacheprovider", "--hypothesis-profile=faults",
    "-W", "ignore::pytest.PytestAssertRewriteWarning",  # plugins of pytest are imported before it
)  # fmt: skip
_BROKEN = 70  # exit code of a child in which pytest itself fails


@dataclass(frozen=True)
class Fault:
    """A change of one file that makes the code wrong."""

    name: str
    file: str
    text: str
    "what the fault replaces; it stands in the file exactly once"
    replacement: str
    tests: tuple[str, ...]
    "arguments of pytest: the tests that should find the fault"


def read_faults(words: Sequence[str]) -> list[Fault]:
    """The faults whose names contain one of the words; all without words."""
    table = tomllib.loads(Path(__file__).with_name("faults.toml").read_text())
    faults = [Fault(**{**fault, "tests": tuple(fault["tests"])}) for fault in table["fault"]]
    return [f for f in faults if not words or any(word in f.name for word in words)]


@contextlib.contextmanager
def planted(fault: Fault, project: Path) -> Iterator[None]:
    """Plant the fault in the project; at the end restore the file and its time stamp.

    Caches of compiled code go by that time.
    """
    path = project / fault.file
    before, status = path.read_text(), path.stat()
    if (count := before.count(fault.text)) != 1:
        raise SystemExit(f"{fault.name}: its text is {count} times in {fault.file}; update it")
    path.write_text(before.replace(fault.text, fault.replacement))
    try:
        yield
    finally:
        path.write_text(before)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def run_tests(project: Path, tests: Sequence[str]) -> int | None:
    """Pytest's exit code, from a child that shares the libraries this process has imported.

    None: the tests did not end in time.
    """
    child = multiprocessing.get_context("fork").Process(target=_run, args=(project, tests))
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        return None
    return child.exitcode


def _run(project: Path, tests: Sequence[str]) -> None:
    os.chdir(project)
    sys.path[:0] = paths = [str(project), str(project / "cli")]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for commands that tests start
    # this program is part of the tests: its copy is imported again with the other tests
    for name in [n for n in sys.modules if n.split(".")[0] == "tests"]:
        del sys.modules[name]
    with Path(project, "pytest.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            code = int(pytest.main([*_OPTIONS, *tests]))
        except BaseException:
            traceback.print_exc()
            code = _BROKEN  # 1, as Python has it, would look like a failed test
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def preload() -> None:
    """Import what most tests need, once for all children; nothing of the project."""
    import hypothesis
    import numba
    import torch
    import transformers
    import zarr

    assert all((hypothesis, numba, torch, transformers.AutoModel, zarr))


def verdict(code: int | None) -> str:
    """The verdict on a planted fault for an exit code of pytest."""
    if code is None:
        return "found: the tests do not end"
    return {int(pytest.ExitCode.OK): "NOT FOUND", int(pytest.ExitCode.TESTS_FAILED): "found"}.get(
        code, f"the tests cannot run: exit code {code}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.planted_faults", description=__doc__)
    parser.add_argument("words", nargs="*", help="only faults whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="name the faults, and run nothing")
    parser.add_argument("--green", action="store_true", help="run the tests without any fault too")
    options = parser.parse_args()
    faults = read_faults(options.words)
    if options.list:
        sys.exit("\n".join(f"{f.name}: {f.file}" for f in faults))
    sys.dont_write_bytecode = True  # of code with faults
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    preload()
    with tempfile.TemporaryDirectory(prefix="planted-faults-") as folder:
        project = Path(folder)
        for name in COPIED:
            copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy2
            copy(PROJECT / name, project / name)
        for fault in faults:  # a stale text shows before the first test runs
            with planted(fault, project):
                pass
        if options.green:
            tests = sorted({test for fault in faults for test in fault.tests})
            if run_tests(project, tests) != 0:
                raise SystemExit(f"red without any fault:\n{_end_of_log(project)}")
        sys.exit(min(1, sum(not _try(fault, project) for fault in faults)))


def _try(fault: Fault, project: Path) -> bool:
    """Plant one fault, print a line, and return whether the tests catch it."""
    began = time.monotonic()
    with planted(fault, project):
        result = verdict(run_tests(project, fault.tests))
    is_caught = result.startswith("found")
    print(f"{time.monotonic() - began:6.1f} s  {result}  {fault.name}", flush=True)  # noqa: T201
    if not is_caught:
        print(_end_of_log(project), flush=True)  # noqa: T201
    return is_caught


def _end_of_log(project: Path) -> str:
    return "\n".join((project / "pytest.log").read_text().splitlines()[-15:])


if __name__ == "__main__":
    main()
