"""The names that `mpcache` and `mptrain` export: documented, typed, and their examples run."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import mpcache
import mptrain
from tests.helpers.fits import config
from tests.helpers.stores import small_store

REPOSITORY = Path(__file__).parents[1]
PACKAGES = (mpcache, mptrain)
NAMES = [(package, name) for package in PACKAGES for name in package.__all__]
RETURNED = {"Code", "Evaluation", "HookpointReport"}  # shown by the examples of functions
CODE_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of examples: model, corpus.jsonl, store, run, and the demo's data."""
    folder = tmp_path_factory.mktemp("playground")
    small_store(folder)
    mptrain.fit(config(str(folder / "store"), folder / "run", kind=("sae",), arch=("mp",)))
    (folder / "data").symlink_to(REPOSITORY / "data")
    return folder


@pytest.mark.parametrize("package", PACKAGES)
def test_a_public_name_is_the_same_thing_everywhere(package) -> None:
    """Package, module, `dir` and type checkers agree on it, and no submodule has its name."""
    submodules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert not submodules & set(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    assert package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        module = importlib.import_module(package._MODULES[name])
        assert getattr(package, name) is getattr(module, name)
        assert not inspect.ismodule(getattr(package, name))
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = package.no_such_name


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_the_names_that_are_there(package) -> None:
    tree = ast.parse(inspect.getsource(package))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    typed = {alias.asname: node.module for node in imports for alias in node.names}
    assert typed == package._MODULES
    assert (Path(package.__file__).parent / "py.typed").exists()


def test_importing_the_packages_is_light() -> None:
    code = (
        "import sys, mpcache, mptrain\n"
        "ours = [n for n in sys.modules if n.startswith(('mpcache.', 'mptrain.'))]\n"
        "assert ours == ['mpcache.version'], ours\n"
        "assert 'numpy' not in sys.modules and 'typer' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("package", "name"), NAMES, ids=[name for _, name in NAMES])
def test_a_public_name_is_documented(package, name: str) -> None:
    """Functions say what they raise; they and the classes that users make have an example."""
    thing = getattr(package, name)
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return
    doc = inspect.getdoc(thing) or ""
    assert doc
    if name in RETURNED or (inspect.isclass(thing) and issubclass(thing, Exception)):
        return
    other = re.search(r"Example: see `(\w+)`", doc)
    assert examples_of(thing) or (other and other[1] in package.__all__), f"{name} has no example"
    if inspect.isroutine(thing):
        assert "Raises:" in doc, f"{name} does not say what it raises"


@pytest.mark.parametrize(("package", "name"), NAMES, ids=[name for _, name in NAMES])
def test_examples_run(
    package, name: str, playground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(playground, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(folder)
    for example in examples_of(getattr(package, name)):
        if isinstance(example, str):
            exec(example, {})
            continue
        report: list[str] = []
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=report.append)
        assert not report, "".join(report)


def examples_of(thing: object) -> list[doctest.DocTest | str]:
    """Doctests and ```python blocks of a function, or of a class and its methods."""
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return []
    module = inspect.getmodule(thing)
    tests = doctest.DocTestFinder().find(thing, thing.__name__, module=module)
    members = [thing, *vars(thing).values()] if inspect.isclass(thing) else [thing]
    docs = [inspect.getdoc(member) or "" for member in members if hasattr(member, "__doc__")]
    blocks = [textwrap.dedent(block) for doc in docs for block in CODE_BLOCK.findall(doc)]
    return [*(test for test in tests if test.examples), *blocks]
