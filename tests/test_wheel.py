"""The wheel: what it installs, how fast its commands answer, and which types users' scripts see."""

import resource
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPT = """\
from pathlib import Path

import mpcache
import mptrain

store = mpcache.open_store("store")
config = mptrain.FitConfig(store="store", run="run", hookpoints=("layers.0",), k=(8, 16))
reveal_type(mpcache.open_store)
reveal_type(store)
reveal_type(mptrain.fit)
reveal_type(mptrain.load_coder(Path("run/coders/name")))
reveal_type(config.k)
"""
MISTAKE = (
    "import mptrain\nmptrain.FitConfig(store='store', run='run', hookpoints='layers.0', k=8)\n"
)
# types of other projects are not tested here, and take minutes
SETTINGS = """\
[mypy]
[mypy-torch.*,transformers.*,datasets.*,numpy.*,numba.*,zarr.*,tokenizers.*,huggingface_hub.*]
follow_imports = skip
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git would give."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "-z"],
                                    cwd=REPOSITORY, text=True).split("\0")  # fmt: skip
    for name in filter(None, names):
        if name.startswith(("mpcache/", "mptrain/", "cli/", "pyproject", "README", "LICENSE")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(target), str(source)], check=True)
    (file,) = target.iterdir()
    return file


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, which borrows its dependencies from that of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def test_the_wheel_holds_the_three_packages_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {name for name in tops if not name.endswith(".dist-info")} == {
        "mpcache", "mptrain", "mpcli",
    }  # fmt: skip
    assert {"mpcache/py.typed", "mptrain/py.typed"} <= set(names)
    assert not [name for name in names if "test" in name.lower()]


def processor_seconds() -> float:
    """Processor time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("program", ["mpcache", "mptrain"])
def test_help_takes_less_than_half_a_second(program: str, python: Path, tmp_path: Path) -> None:
    """In processor time, the best of five: other work on the machine is not what is measured."""
    command = [str(python), "-c", f"from mpcli.{program} import main; main()", "--help"]
    seconds = []
    for _ in range(5):
        start = processor_seconds()
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        seconds.append(processor_seconds() - start)
    assert "Commands:" in done.stdout
    assert min(seconds) < 0.5


def mypy(script: str, python: Path, folder: Path) -> str:
    (folder / "script.py").write_text(script)
    (folder / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=mypy.ini", "script.py",
               f"--python-executable={python}", f"--cache-dir={folder / 'cache'}"]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_a_strict_type_checker_sees_types(python: Path, tmp_path: Path) -> None:
    report = mypy(SCRIPT, python, tmp_path)
    assert "Success" in report, report
    revealed = [
        line.split("Revealed type is ")[1] for line in report.splitlines() if "Reveal" in line
    ]
    assert len(revealed) == 5
    assert not [kind for kind in revealed if kind.strip('"') == "Any"]
    assert "Store" in revealed[1]
    assert "tuple[" in revealed[4]
    assert "int, ...]" in revealed[4]
    assert "incompatible type" in mypy(MISTAKE, python, tmp_path)
