"""Other tools against ours on the same tensors; each test needs its tool installed."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import other_coder_adapters
from benchmarks.other_coder_adapters import find_methods, overcomplete_mp, saelens_mp, sparsify_topk
from benchmarks.tool_imports import import_quietly
from mptrain.bench.measure import CodeTensors, CodingMethod, saved_bytes
from mptrain.coders.coder import Coder
from mptrain.coders.fvu import reconstruction_loss
from mptrain.config.coder import CoderConfig
from tests.helpers import reference

Adapter = Callable[[Tensor, Tensor, int], CodingMethod]


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(module) is None, reason=f"needs {module}")


SAELENS = pytest.param(saelens_mp, marks=needs("sae_lens"), id="saelens")
OVERCOMPLETE = pytest.param(overcomplete_mp, marks=needs("overcomplete"), id="overcomplete")
SPARSIFY = pytest.param(sparsify_topk, marks=needs("sparsify"), id="sparsify")


def our_coder(D: int, M: int, k: int, arch: str = "mp", seed: int = 0) -> Coder:
    """Random unit-norm atoms and a random bias."""
    config = CoderConfig(
        inputs=("h:output",), targets=("h:output",), kind="sae", arch=arch, k=k, expansion=M // D
    )  # type: ignore[arg-type]
    coder = Coder(config, D, D)
    generator = torch.Generator().manual_seed(seed)
    bias_D = torch.randn(D, generator=generator)
    coder.initialise_(bias_D, bias_D, generator)
    return coder


def adapted(adapter: Adapter, coder: Coder) -> CodingMethod:
    return adapter(coder.decoder_ME.detach(), coder.b_D.detach(), coder.config.k)


def dense(codes: CodeTensors | None, latents: int) -> Tensor:
    assert codes is not None
    return codes if isinstance(codes, Tensor) else reference.dense(*codes, latents)


@pytest.mark.parametrize(("D", "M", "k"), [(16, 64, 4), (24, 96, 1), (8, 64, 30)])
@pytest.mark.parametrize("adapter", [SAELENS, OVERCOMPLETE])
def test_chooses_the_atoms_of_direct_with_their_values(adapter: Adapter, D: int, M: int, k: int):
    """Also where an atom is chosen repeatedly: 30 steps in 8 dimensions."""
    coder, x_BD = our_coder(D, M, k), torch.randn(50, D)
    with torch.no_grad():
        theirs_BM = dense(adapted(adapter, coder).encode(x_BD), M)
        code = coder.encode(x_BD)
    ours_BM = reference.dense(code.idx_BK, code.val_BK, M)
    assert ((theirs_BM != 0) == (ours_BM != 0)).float().mean() > 0.999
    torch.testing.assert_close(theirs_BM, ours_BM, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("adapter", "biased"), [
    pytest.param(saelens_mp, True, marks=needs("sae_lens"), id="saelens"),
    pytest.param(overcomplete_mp, False, marks=needs("overcomplete"), id="overcomplete"),
])  # fmt: skip
def test_its_autograd_gives_our_gradient(adapter: Adapter, biased: bool):
    """Other tools keep every step, ours undoes the steps; the dictionary's gradient is equal."""
    coder, x_BD = our_coder(16, 64, 6), torch.randn(40, 16)
    other = adapted(adapter, coder)
    assert other.loss is not None
    theirs, ours = other.loss(x_BD), reconstruction_loss(x_BD, coder(x_BD), 1.0)
    torch.testing.assert_close(theirs, ours)
    theirs.backward()
    ours.backward()
    grads = {tuple(p.shape): p.grad for p in other.parameters}
    torch.testing.assert_close(grads[64, 16], coder.decoder_ME.grad, atol=1e-5, rtol=1e-4)
    if biased:
        torch.testing.assert_close(grads[(16,)], coder.b_D.grad, atol=1e-5, rtol=1e-4)


@needs("overcomplete")
def test_overcomplete_continues_where_no_score_is_positive():
    """overcomplete takes an atom with a negative score where no score is positive."""
    coder, x_BD = our_coder(2, 2, 1), torch.tensor([[-1.0, -1.0]])
    with torch.no_grad():
        coder.b_D.zero_()
        coder.decoder_ME.copy_(torch.eye(2))
        theirs_BM = dense(adapted(overcomplete_mp, coder).encode(x_BD), 2)
    assert coder.encode(x_BD).idx_BK.tolist() == [[-1]]
    assert theirs_BM.min() == -1


@needs("sparsify")
def test_sparsify_is_our_topk():
    coder, x_BD = our_coder(16, 64, 4, "topk"), torch.randn(40, 16)
    other = sparsify_topk(coder.decoder_ME.detach(), coder.b_D.detach(), 4)
    code = coder.encode(x_BD)
    ours_BM = reference.dense(code.idx_BK, code.val_BK, 64)
    with torch.no_grad():
        torch.testing.assert_close(dense(other.encode(x_BD), 64), ours_BM, atol=1e-5, rtol=1e-5)
    assert other.loss is not None
    centred = (x_BD - x_BD.mean(0)).square().sum()
    torch.testing.assert_close(other.loss(x_BD), (x_BD - coder(x_BD)).square().sum() / centred)


@pytest.mark.parametrize(("adapter", "megabytes"), [
    pytest.param(saelens_mp, 25.6, marks=needs("sae_lens"), id="saelens"),
    pytest.param(overcomplete_mp, 570.8, marks=needs("overcomplete"), id="overcomplete"),
    pytest.param(sparsify_topk, 0.63, marks=needs("sparsify"), id="sparsify"),
])  # fmt: skip
def test_bytes_kept_for_the_backward_pass(adapter: Adapter, megabytes: float):
    """B = 256, D = 256, M = 8192, K = 32, float32; parameters and rows not counted: ours 0.62 MB.

    With parameters: SAELens 34.2, overcomplete the same (it keeps a scaled copy of them), sparsify
    17.4.
    """
    coder, x_BD = our_coder(256, 8192, 32), torch.randn(256, 256)
    other = adapted(adapter, coder)
    assert other.loss is not None
    kept = saved_bytes(lambda: other.loss(x_BD), (x_BD, *other.parameters))  # type: ignore[misc]
    assert kept / 1e6 == pytest.approx(megabytes, rel=0.01)


def test_our_bytes_kept_for_the_backward_pass():
    coder, x_BD = our_coder(256, 8192, 32), torch.randn(256, 256)
    inputs = (x_BD, *coder.parameters())
    kept = saved_bytes(lambda: reconstruction_loss(x_BD, coder(x_BD), 1.0), inputs)
    assert kept / 1e6 == pytest.approx(0.62, rel=0.01)


@pytest.mark.parametrize("adapter", [SAELENS, OVERCOMPLETE, SPARSIFY])
def test_trains(adapter: Adapter):
    coder, x_BD = our_coder(16, 64, 4), torch.randn(20, 16)
    other = adapted(adapter, coder)
    assert other.loss is not None
    before = other.loss(x_BD)
    before.backward()
    with torch.no_grad():
        for parameter in other.parameters:
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    assert other.loss(x_BD) < before


def test_a_tool_that_does_not_work_is_absent_with_the_reason():
    """A tool that breaks does not break the comparison."""

    def missing(*_: object) -> CodingMethod:
        raise ModuleNotFoundError("No module named 'a.b'", name="a")

    def broken(*_: object) -> CodingMethod:
        raise RuntimeError("operator does not exist\nand so on")

    def silent(*_: object) -> CodingMethod:
        raise KeyError

    method = CodingMethod(name="c", encode=lambda x: x, loss=None, parameters=(), is_pursuit=False)
    adapters = {"a": missing, "b": broken, "c": lambda *_: method, "d": silent}
    methods, absent = find_methods(tuple(adapters), torch.eye(2), torch.zeros(2), 1, adapters)
    assert methods == [method]
    assert absent == {
        "a": "there is no module a",
        "b": "RuntimeError: operator does not exist",
        "d": "KeyError",
    }


def test_an_imported_tool_neither_prints_nor_fails_by_its_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """JSON goes to standard output; warnings are errors here."""
    text = "import warnings\nprint('hello')\nwarnings.warn('old', DeprecationWarning)\n"
    (tmp_path / "talkative.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import_quietly("talkative")
    assert capsys.readouterr().out == ""


def test_overcomplete_is_imported_without_its_vision_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The SAEs of a package whose import fails are imported; no stand-in for the package stays."""
    for name in [name for name in sys.modules if name.split(".")[0] == "overcomplete"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "overcomplete/sae").mkdir(parents=True)
    (tmp_path / "overcomplete/__init__.py").write_text("import no_such_torchvision")
    (tmp_path / "overcomplete/base.py").write_text("here = 1")
    (tmp_path / "overcomplete/sae/__init__.py").write_text("from ..base import here")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        module = other_coder_adapters.overcomplete_sae()
        assert (module.here, module.__file__) == (1, str(tmp_path / "overcomplete/sae/__init__.py"))
        assert "overcomplete" not in sys.modules
    for name in ("overcomplete.base", "overcomplete.sae"):
        del sys.modules[name]  # for good: monkeypatch would bring the false ones back
