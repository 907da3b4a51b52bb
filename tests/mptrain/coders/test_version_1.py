"""Coders in format version 1: `tests/golden/coders-v1`, written by the code of that version."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mpcache.errors import UsageError
from mptrain.coders.checkpoint import load_coder, save_coder

GOLDEN = Path(__file__).parents[2] / "golden" / "coders-v1"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", NAMES)
def test_reads_and_predicts_as_before(name: str, tmp_path: Path) -> None:
    coder, trained = load_coder(GOLDEN / name)
    predictions = load_file(GOLDEN / "predictions.safetensors")
    with torch.no_grad():
        y_BE = coder(predictions["x"])
    torch.testing.assert_close(y_BE, predictions[name], atol=1e-6, rtol=1e-6)
    assert trained["step"] == 3
    save_coder(tmp_path / "coder", coder, trained)
    about = json.loads((tmp_path / "coder" / "coder.json").read_text())
    assert about["format_version"] == 2
    assert about["config"]["targets"] == ["layers.1.mlp:output"]
    again, _ = load_coder(tmp_path / "coder")
    assert again.config == coder.config
    assert torch.equal(again(predictions["x"]), coder(predictions["x"]))


def test_covers_encoders_thresholds_and_both_dictionaries() -> None:
    names = {tensor for name in NAMES for tensor in load_file(GOLDEN / name / "coder.safetensors")}
    assert names == {
        "b_D", "c_E", "W_MD", "U_MD", "encoder_MD", "encoder_bias_M", "V_ME", "S_ED", "threshold",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ban_chosen": True},
            "trained with ban_chosen, which this version of mptrain does not have",
        ),
        ({"atom_dropout": 0.5}, "trained with atom_dropout"),
    ],
    ids=str,
)
def test_refuses_options_that_are_gone(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "coder"
    shutil.copytree(GOLDEN / NAMES[0], folder)
    about = json.loads((folder / "coder.json").read_text())
    about["config"] |= changes
    (folder / "coder.json").write_text(json.dumps(about))
    with pytest.raises(UsageError, match=message):
        load_coder(folder)
