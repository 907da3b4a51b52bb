"""A run follows its plan, and splitting it into passes for memory changes no bit."""

import dataclasses
import itertools
import json
import typing
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mpcache.store.reader import open_store
from mpcli.mptrain import app as mptrain
from mpcli.values import count
from mptrain.bench.measure import peak_bytes
from mptrain.coders.coder import Coder
from mptrain.config.coder_settings import Optimizer
from mptrain.pursuit.numba_backend import free_room
from mptrain.runs import fit as fit_module
from mptrain.runs import run_dir
from mptrain.runs.fit import fit, plan_fit
from mptrain.runs.memory import MOMENTS, CoderMemory, coder_memory, group_into_passes, pass_bytes
from mptrain.runs.plan import RunPlan
from mptrain.runs.state import RunProgress
from mptrain.training.distributed import ProcessGroup
from mptrain.training.train_step import CoderTrainer
from tests.helpers.fits import config, equal, interrupt_at, lasting, state, weights
from tests.helpers.stores import small_store
from tests.helpers.trainers import BASE, D, make_learner, optimizers_of, train_

CPU = torch.device("cpu")
MIXED = {
    "hookpoints": ("layers.0", "layers.1.mlp"),
    "kind": ("sae",),
    "arch": ("mp", "topk", "batch-mp"),
    "k": (2, 3),
    "expansion": (1, 3),
    "rows": 64 * 6,
    "eval_rows": 64,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_store(tmp_path_factory.mktemp("plan"))[0])


def results_of(run: Path) -> Any:
    return json.loads((run / "results.json").read_text())


@pytest.mark.parametrize("optimizer", typing.get_args(Optimizer))
@pytest.mark.parametrize("arch", ["mp", "topk", "batch-topk"])
@pytest.mark.parametrize("kind", ["sae", "skip-transcoder"])
def test_what_is_held_is_counted(optimizer: Any, arch: Any, kind: Any) -> None:
    coder_config = dataclasses.replace(BASE, optimizer=optimizer, arch=arch, kind=kind, lr=1e-3)
    trainer = make_learner(coder_config)
    train_(trainer, 0, 1)
    needs = coder_memory(coder_config, D, D if kind == "sae" else D - 2, 64, CPU)
    held = trainer.state_tensors()
    # single numbers, such as an optimizer's step count, are not worth planning
    large = [t.numel() * t.element_size() for t in held.values() if t.numel() > 1]
    small = sum(p.numel() * 4 for p in trainer.coder.buffers())
    assert needs.held_bytes == sum(large) + small
    assert needs.parameters == sum(p.numel() for p in trainer.coder.parameters())


def test_every_optimizer_is_counted() -> None:
    assert MOMENTS.keys() == set(typing.get_args(Optimizer))


@pytest.mark.parametrize(
    "changes",
    [{}, {"arch": "topk"}, {"backend": "direct"}, {"dead_rows": 1}, {"kind": "skip-transcoder"}],
    ids=str,
)
def test_the_estimate_of_a_step_is_near_what_it_takes(changes: dict[str, Any]) -> None:
    """Rows so large that the base memory of the process does not matter."""
    width, rows = 256, 2048
    coder_config = dataclasses.replace(BASE, k=16, expansion=8, **changes)
    coder = Coder(coder_config, width, width)
    zero_D = torch.zeros(width)
    coder.initialise_(zero_D, zero_D, torch.Generator().manual_seed(0))
    variances, dead_rows = (float(width), float(width)), coder_config.resolved_dead_rows(10**6, 1)
    optimizers = optimizers_of(coder, coder_config, 9)
    trainer = CoderTrainer(coder, optimizers, *variances, dead_rows=dead_rows)
    x_BD, y_BE = torch.randn(rows, width), torch.randn(rows, width)
    y_BE = x_BD if coder_config.kind == "sae" else y_BE
    trainer.step(x_BD, y_BE)
    if coder_config.dead_rows == 1:
        trainer.usage.rows_since_fired_M.fill_(10)
    free_room()
    peak = peak_bytes(lambda: trainer.step(x_BD, y_BE), CPU)
    if peak is None:
        pytest.skip("this system does not tell a process's peak")
    peak += x_BD.nbytes + (0 if y_BE is x_BD else y_BE.nbytes)  # copies made by filters
    assert 0.8 * peak < coder_memory(coder_config, width, width, rows, CPU).step_bytes < 5 * peak


def needs(name: str, held: int, step: int) -> CoderMemory:
    return CoderMemory(
        name=name, latents=1, parameters=1, weights_bytes=held, optimizer_bytes=0, step_bytes=step
    )


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=9),
    st.integers(1, 300),
    st.integers(1, 3),
)
def test_passes_hold_all_coders_in_order_and_fit(
    sizes: list[tuple[int, int]], most: int, processes: int
) -> None:
    """With several processes, the share of coders of each process."""
    group = ProcessGroup(size=processes, spread="coders")

    def largest(names: Sequence[str]) -> int:
        shares = [[by_name[n] for n in share] for share in group.coders_per_process(names)]
        return max(pass_bytes(share) for share in shares if share)

    coders = [needs(str(n), *size) for n, size in enumerate(sizes)]
    by_name = {need.name: need for need in coders}
    if any(held + step > most for held, step in sizes):
        with pytest.raises(ValueError, match="max_memory must hold at least one coder, got"):
            group_into_passes(coders, most, group)
        return
    passes = group_into_passes(coders, most, group)
    assert [name for names in passes for name in names] == list(by_name)
    assert all(largest(names) <= most for names in passes)
    for names, (following, *_) in itertools.pairwise(passes):
        assert largest([*names, following]) > most, "a pass takes all that fit"
    assert group_into_passes(coders, None) == [list(by_name)]


def test_a_mixed_grid_trains_as_each_coder_alone(store: str, tmp_path: Path) -> None:
    """Widths, K, architectures and hookpoints side by side, in one pass and in several."""
    fit(config(store, tmp_path / "together", **MIXED))
    plan = plan_fit(config(store, tmp_path / "split", **MIXED))
    most = pass_bytes(plan.coders[:5]) + 1
    split = config(store, tmp_path / "split", **MIXED, max_memory=most)
    assert len(plan_fit(split).passes) > 2
    fit(split)
    assert equal(weights(tmp_path / "together"), weights(tmp_path / "split"))
    alone: dict[str, torch.Tensor] = {}
    for number, coder in enumerate(split.coders()[::5]):
        changes = {
            "hookpoints": (coder.sides_name,),
            "arch": (coder.arch,),
            "k": (coder.k,),
        }
        solo = {**MIXED, **changes, "expansion": (coder.expansion,)}
        fit(config(store, tmp_path / str(number), **solo))
        alone |= weights(tmp_path / str(number))
    together = weights(tmp_path / "together")
    assert alone
    assert all(torch.equal(tensor, together[name]) for name, tensor in alone.items())
    by_coder = [sorted(lasting(tmp_path / n), key=repr) for n in ("together", "split")]
    assert by_coder[0] == by_coder[1]
    results = [
        json.loads((tmp_path / n / "results.json").read_text()) for n in ("together", "split")
    ]
    assert [r["coder"] for r in results[0]] == [r["coder"] for r in results[1]]
    assert [r["validation"] for r in results[0]] == [r["validation"] for r in results[1]]


@pytest.mark.parametrize("stops_at", [3, 6, 14, 18])
def test_passes_continue_where_they_stopped(store: str, tmp_path: Path, stops_at: int) -> None:
    """Six steps a pass: stopped in the first, at its end, in the third, and at the very end."""
    few: dict[str, Any] = {"kind": ("sae",), "arch": ("mp",), "k": (2, 3, 4), "rows": 64 * 6}
    alone = max(
        need.held_bytes + need.step_bytes
        for need in plan_fit(config(store, tmp_path, **few)).coders
    )
    few |= {"max_memory": alone, "eval_rows": 64, "save_every": 4}
    assert len(plan_fit(config(store, tmp_path, **few)).passes) == 3
    fit(config(store, tmp_path / "whole", **few))
    with pytest.raises(KeyboardInterrupt):
        fit(config(store, tmp_path / "broken", **few), on_step=interrupt_at(stops_at))
    fit(config(store, tmp_path / "broken", **few))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert equal(state(tmp_path / "whole"), state(tmp_path / "broken"))
    assert lasting(tmp_path / "whole") == lasting(tmp_path / "broken")
    results = [results_of(tmp_path / n) for n in ("whole", "broken")]
    assert [r["validation"] for r in results[0]] == [r["validation"] for r in results[1]]


def test_passes_are_those_that_the_run_began_with(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version or another device might plan other passes."""
    few: dict[str, Any] = {"kind": ("sae",), "rows": 64 * 6, "eval_rows": 64}
    fit(config(store, tmp_path / "whole", **few))
    make, calls = fit_module.make_plan, 0

    def one_coder_each(*args: Any) -> RunPlan:
        plan = make(*args)
        return dataclasses.replace(plan, passes=[[need.name] for need in plan.coders])

    def interrupted(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "make_plan", one_coder_each)
        with pytest.raises(KeyboardInterrupt):
            fit(config(store, tmp_path / "broken", **few, save_every=1), on_step=interrupted)
    assert len(plan_fit(config(store, tmp_path / "broken", **few)).passes) == 2
    fit(config(store, tmp_path / "broken", **few, save_every=1), on_step=interrupted)
    assert calls == 13, "six steps for each of two coders, and one that was interrupted"
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_bytes_stored_are_those_of_the_files(store: str) -> None:
    opened = open_store(store)
    sides = [("layers.0", "output"), ("layers.1.mlp", "input")]
    for split in ("train", "validation"):
        numbers = {part.number for part in opened.parts(sides, split)}
        wanted = sum(
            (Path(store) / "arrays.zarr" / name / "c" / target).stat().st_size
            for number in numbers
            for name, target in (
                ("acts/layers.0/output", f"{number}/0"),
                ("acts/layers.1.mlp/input", f"{number}/0"),
                ("rows/position", str(number)),
            )
        )
        assert opened.stored_bytes(sides, split) == wanted > 0


def test_reading_is_planned_by_rows_sides_and_passes(store: str, tmp_path: Path) -> None:
    def read(**changes: Any) -> int:
        return plan_fit(config(store, tmp_path, **{"eval_every": 10**6, **changes})).read_bytes

    opened = open_store(store)
    sides = [("layers.0", "output")]
    rows = sum(part.rows for part in opened.parts(sides, "train"))
    one_coder: dict[str, Any] = {"hookpoints": ("layers.0",), "kind": ("sae",), "batch_rows": rows}
    held_out = opened.stored_bytes(sides, "validation")
    watched = read(**one_coder, rows=rows, eval_rows=1) - opened.stored_bytes(sides, "train")
    assert held_out <= watched < 1.1 * held_out, "the last validation is of all rows"
    assert read(**one_coder, rows=2 * rows, eval_rows=1) - read(
        **one_coder, rows=rows, eval_rows=1
    ) == (opened.stored_bytes(sides, "train"))
    assert read(hookpoints=("layers.0", "layers.1.mlp"), kind=("sae",)) > read(
        hookpoints=("layers.0",), kind=("sae",)
    )


FIT = ("--k", "3", "--expansion", "2", "--rows", "800", "--batch-rows", "64")


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(mptrain, ["fit", *arguments])


def test_a_dry_run_prints_the_plan_and_writes_nothing(store: str, tmp_path: Path) -> None:
    arguments = (store, "--run", str(tmp_path / "run"), "--hookpoints", "layers.0", *FIT)
    completed = invoke(*arguments, "--dry-run")
    assert completed.exit_code == 0, completed.output
    assert "passes: 1, each of 12 train steps (0.667 epochs) on" in completed.stdout
    assert "layers.0-sae-mp-k3-x2-seed0" in completed.stdout
    plan = json.loads(invoke(*arguments, "--dry-run", "--json").stdout)
    assert plan["passes"] == [["layers.0-sae-mp-k3-x2-seed0", "layers.0-sae-topk-k3-x2-seed0"]]
    assert [need["parameters"] for need in plan["coders"]] == [16 * 32 + 16, 2 * 16 * 32 + 32 + 16]
    items = ["weights", "optimizer", "train step", "batches"]
    host = ["windows of rows (host)", "positions, tokens and norms (host)"]
    assert list(plan["memory_bytes"]) == items + host
    assert plan["memory_bytes"]["weights"] == 4 * sum(need["parameters"] for need in plan["coders"])
    assert not list(tmp_path.iterdir())


def test_memory_that_holds_no_coder_is_explained_by_purpose(store: str, tmp_path: Path) -> None:
    arguments = (store, "--run", str(tmp_path / "run"), "--hookpoints", "layers.0", *FIT)
    completed = invoke(*arguments, "--max-memory", "1kB")
    assert completed.exit_code == 2
    assert (
        "max_memory must hold at least one coder, got 1000 bytes, but layers.0-sae-mp"
        in completed.stderr
    )
    assert "for weights" in completed.stderr
    assert not list(tmp_path.iterdir())


def test_resume_needs_no_other_option(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    arguments = (store, "--run", str(run), "--hookpoints", "layers.0", *FIT, "--lr", "1e-3,2e-3")
    assert invoke(*arguments, "--save-every", "5").exit_code == 0
    expected = weights(run)
    other = ("--run", str(tmp_path / "other"), "--save-every", "5")
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "fit", partial(fit, on_step=interrupt_at(8)))
        assert invoke(*arguments, *other).exit_code == 130
    (tmp_path / "other").rename(moved)
    resumed = invoke("--resume", str(moved))
    assert resumed.exit_code == 0, resumed.output
    assert equal(expected, weights(moved))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--resume", "RUN", "--k", "4"),
            "from the run; remove k; only these can be changed",
        ),
        (("--resume", "RUN", "--k", "64"), "k cannot be given with --resume"),
        (("--resume", "RUN", "--rows", "10M"), "rows cannot be given with --resume"),
        (("--resume", "RUN", "--run", "other"), "run cannot be given with --resume"),
        (("--resume", "nowhere"), "nowhere holds no run"),
        ((), "give STORE and --run, or give --resume RUN"),
    ],
    ids=str,
)
def test_errors_of_resume(
    store: str, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    fit(config(store, tmp_path / "run", rows=64, kind=("sae",)))
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    result = invoke(*(str(tmp_path / "run") if o == "RUN" else o for o in options))
    assert result.exit_code == 2
    assert message in result.stderr
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_options_given_at_their_default_count_as_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}

    def noted(run: str, options: dict[str, Any]) -> None:
        seen.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_dir, "resumed_config", noted)
    invoke("--resume", "RUN", "--save-every", "200", "--device", "auto", "--no-follow")
    assert seen == {"save_every": 200, "device": "auto", "follow": False}
    assert "[default: 10M]" in " ".join(invoke("--help").stdout.split())


def test_what_processes_share_is_of_the_command(store: str, tmp_path: Path) -> None:
    fit(config(store, tmp_path / "run", rows=64, kind=("sae",)))
    file = tmp_path / "run/config.json"
    about = json.loads(file.read_text())
    about["fit"]["spread"] = "rows"
    file.write_text(json.dumps(about))
    assert run_dir.resumed_config(str(tmp_path / "run"), {}).spread is None
    assert run_dir.resumed_config(str(tmp_path / "run"), {"spread": "coders"}).spread == "coders"


def test_a_plan_of_a_folder_with_another_run_is_refused(store: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter").touch()
    with pytest.raises(ValueError, match="has other files, but no run"):
        plan_fit(config(store, tmp_path / "full"))
    fit(config(store, tmp_path / "run", rows=64, kind=("sae",)))
    with pytest.raises(ValueError, match=r"a different config .*rows: 64 there, 128 asked"):
        plan_fit(config(store, tmp_path / "run", rows=128, kind=("sae",)))


def test_clocks_continue_in_the_next_pass() -> None:
    clocks = {"wait_seconds": 1.5, "validation_seconds": 2.5}
    first = RunProgress(passes=[["a"], ["b"]], step=9, **clocks)
    following = RunProgress(passes=first.passes, pass_index=1, **clocks)
    assert first.next_pass(()) == following


@pytest.mark.parametrize(
    ("text", "value"), [("20GB", 20 * 10**9), ("1.5TB", 15 * 10**11), ("7kB", 7000), ("1e3", 1000)]
)
def test_bytes_are_written_as_people_do(text: str, value: int) -> None:
    assert count(text) == value
