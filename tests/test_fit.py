"""Laws of a run: stopping, watching and company change no bit of a coder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mptrain import fit as fit_stage
from mptrain.checkpoint import load_coder
from mptrain.config import FitConfig
from mptrain.evaluate import evaluate_coder
from mptrain.fit import fit
from mptrain.metrics import Record, read_records
from stores import small_store

BLANK = {"train_seconds": 0.0, "wait_seconds": 0.0, "rows_per_second": 0.0, "peak_memory_bytes": 0}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_store(tmp_path_factory.mktemp("fit"))[0])


def config(store: str, run: Path, **changes: Any) -> FitConfig:
    settings: dict[str, Any] = {
        "store": store,
        "run": str(run),
        "hookpoints": ("layers.1.mlp",),
        "kind": ("sae", "skip-transcoder"),
        "k": (3,),
        "expansion": (2,),
        "rows": 64 * 24,
        "batch_rows": 64,
        "window_rows": 128,
        "log_every": 2,
        "eval_every": 8,
        "save_every": 5,
        "dead_rows": 200,
        "device": "cpu",
        **changes,
    }
    return FitConfig(**settings)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(run.glob("coders/*/coder.safetensors"))
        for name, tensor in load_file(file).items()
    }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def lasting(run: Path) -> list[Record]:
    """Records without what depends on the clock and the process."""
    records = [dataclasses.asdict(r) for r in read_records(run / "metrics.jsonl")]
    return [Record(**{**r, **BLANK}) for r in records]


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("stops_at", [1, 5, 7, 23])
def test_interrupted_equals_uninterrupted(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, stops_at: int
) -> None:
    fit(config(store, tmp_path / "whole", optimizer=optimizer))
    broken = config(store, tmp_path / "broken", optimizer=optimizer)
    train, calls = fit_stage.Fitting._train, 0

    def interrupted(self: fit_stage.Fitting, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stops_at:
            raise KeyboardInterrupt
        return train(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(fit_stage.Fitting, "_train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(broken)
    fit(broken)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert lasting(tmp_path / "whole") == lasting(tmp_path / "broken")
    (whole,), (continued,) = (list((tmp_path / n / "state").iterdir()) for n in ("whole", "broken"))
    assert equal(load_file(whole / "state.safetensors"), load_file(continued / "state.safetensors"))


def test_watching_changes_no_bit(store: str, tmp_path: Path) -> None:
    often = {"log_every": 1, "eval_every": 1, "save_every": 1, "eval_rows": 50}
    fit(config(store, tmp_path / "often", **often))
    fit(config(store, tmp_path / "seldom", log_every=99, eval_every=99, save_every=99))
    assert equal(weights(tmp_path / "often"), weights(tmp_path / "seldom"))
    assert len(lasting(tmp_path / "often")) > len(lasting(tmp_path / "seldom"))


def test_company_changes_no_bit(store: str, tmp_path: Path) -> None:
    together = {"hookpoints": ("layers.0", "layers.1.mlp"), "kind": ("sae",), "seed": (0, 1)}
    fit(config(store, tmp_path / "together", **together))
    found = weights(tmp_path / "together")
    alone: dict[str, torch.Tensor] = {}
    for number, one in enumerate(config(store, tmp_path, **together).coders()):
        run = tmp_path / str(number)
        solo = {"hookpoints": (one.hookpoint,), "arch": (one.arch,), "seed": (one.seed,)}
        fit(config(store, run, kind=("sae",), **solo))
        alone |= weights(run)
    assert equal(found, alone)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": (1,)},
        {"order_seed": 1},
        {"window_rows": 32},
        {"lr": 0.01},
        {"warmup_share": 0.5},
        {"optimizer": "adam"},
        {"batch_rows": 32},
        {"rows": 64 * 20},
        {"skip_positions": 3},
        {"k": (2,)},
        {"expansion": (3,)},
        {"kind": ("transcoder",)},
        {"tolerance": 0.9, "arch": ("mp",)},
        {"auxk_alpha": 0.0, "dead_rows": 1, "arch": ("topk",)},
        {"auxk_alpha": 0.0, "dead_rows": 1, "arch": ("mp",)},
        {"dead_rows": 1, "arch": ("topk",)},
        {"backend": "shortlist", "shortlist_size": 2, "arch": ("mp",)},
    ],
    ids=str,
)
def test_every_option_changes_the_coders(
    store: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    base = {"arch": changes.get("arch", ("mp", "topk"))}
    if "auxk_alpha" in changes:
        base["dead_rows"] = 1
    fit(config(store, tmp_path / "base", **base))
    fit(config(store, tmp_path / "other", **{**base, **changes}))
    first = sorted(weights(tmp_path / "base").items())
    second = sorted(weights(tmp_path / "other").items())
    unequal = [a for (_, a), (_, b) in zip(first, second, strict=False) if not torch.equal(a, b)]
    assert unequal or len(first) != len(second)


def test_back_ends_agree_but_are_named_apart(store: str, tmp_path: Path) -> None:
    chosen = {"arch": ("mp",), "kind": ("sae",)}
    for backend in ("direct", "gram"):
        fit(config(store, tmp_path / backend, backend=backend, **chosen))
    direct, gram = (
        json.loads((tmp_path / n / "results.json").read_text())[0] for n in ("direct", "gram")
    )
    assert direct["coder"] != gram["coder"]
    assert direct["validation"]["fvu"] == pytest.approx(gram["validation"]["fvu"], rel=0.02)


def test_a_diverged_coder_stops_and_the_others_go_on(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(config(store, tmp_path / "well"))
    make = fit_stage.make_trainee

    def spoilt(one: Any, *rest: Any) -> Any:
        trainee = make(one, *rest)
        if one.arch == "mp" and one.kind == "sae":
            trainee.learner.coder.b_D.data.fill_(float("nan"))
        return trainee

    monkeypatch.setattr(fit_stage, "make_trainee", spoilt)
    results = fit(config(store, tmp_path / "ill"))
    assert [r["coder"] for r in results if r["diverged"]] == [
        "layers.1.mlp-sae-mp-k3-x2-seed0-dead-rows200"
    ]
    ill, well = weights(tmp_path / "ill"), weights(tmp_path / "well")
    assert len({name.split("/")[0] for name in ill}) == 3
    assert all(torch.equal(tensor, well[name]) for name, tensor in ill.items())
    json.loads((tmp_path / "ill" / "results.json").read_text(), parse_constant=pytest.fail)


def test_training_explains_more_and_atoms_keep_unit_norm(store: str, tmp_path: Path) -> None:
    results = fit(config(store, tmp_path / "run", rows=64 * 200, eval_every=5))
    for result in results:
        name = result["coder"]
        course = [r.validation_fvu for r in lasting(tmp_path / "run") if r.coder == name]
        course = [fvu for fvu in course if fvu is not None]
        assert course[-1] < 0.9 * course[0]
        coder, trained = load_coder(tmp_path / "run" / "coders" / name)
        assert trained["coder"] == name
        for unit in coder.unit_norm:
            norms = coder.get_parameter(unit).norm(dim=1)
            torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_saved_batch_mp_coder_keeps_its_threshold(store: str, tmp_path: Path) -> None:
    (result,) = fit(config(store, tmp_path / "run", arch=("batch-mp",), kind=("sae",)))
    coder, _ = load_coder(tmp_path / "run" / "coders" / result["coder"])
    assert coder.threshold is not None
    assert coder.threshold > 0
    assert 1 < result["validation"]["l0"] < 6, "near k = 3, and not all of 2 k steps"
    assert evaluate_coder(tmp_path / "run/coders" / result["coder"], Path(store), ())[0].l0 == (
        pytest.approx(result["validation"]["l0"], rel=1e-3)
    )


def test_damaged_and_foreign_coders_are_refused(store: str, tmp_path: Path) -> None:
    fit(config(store, tmp_path / "run", arch=("mp",), kind=("sae",)))
    (folder,) = (tmp_path / "run" / "coders").iterdir()
    with pytest.raises(ValueError, match="holds no coder"):
        load_coder(tmp_path)
    data = (folder / "coder.safetensors").read_bytes()
    (folder / "coder.safetensors").write_bytes(data[:-8])
    with pytest.raises(ValueError, match="damaged"):
        load_coder(folder)
    about = json.loads((folder / "coder.json").read_text())
    (folder / "coder.json").write_text(json.dumps({**about, "format_version": 3}))
    with pytest.raises(ValueError, match="coder format 3"):
        load_coder(folder)
