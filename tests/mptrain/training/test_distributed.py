"""Several processes train the same coders as one: by shared rows, and by spread coders."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mptrain.config.coder import CoderConfig
from mptrain.runs.fit import fit
from mptrain.runs.metrics_file import read_records
from mptrain.training.distributed import SINGLE_PROCESS, ProcessGroup, join_process_group
from mptrain.training.train_step import CoderTrainer
from tests.helpers import fits
from tests.helpers.stores import small_store
from tests.helpers.trainers import BASE, TRANSCODER, make_learner, optimizers_of, rows_of, train_

CONFIGS = [
    BASE,
    replace(BASE, dead_rows=1),
    replace(BASE, arch="topk", dead_rows=1, micro_batch_rows=10),
    replace(BASE, arch="batch-mp"),
    replace(BASE, arch="batch-topk"),
    replace(TRANSCODER, subtract="separate", begin_as="topk", begin_share=0.5),
    replace(TRANSCODER, normalise=True, multi_topk=True),
]
STATE, GRADIENT = "state.", "gradient."


def prepared(config: CoderConfig, ranks: ProcessGroup) -> CoderTrainer:
    """A coder after a few train steps in one process."""
    plain = make_learner(replace(config, micro_batch_rows=None))
    train_(plain, 0, 4)
    state = {n: t.clone() for n, t in plain.state_tensors().items()}
    coder = make_learner(config).coder
    objective = plain.objective
    scale = plain.scale
    trainer = CoderTrainer(
        coder,
        optimizers_of(coder, config, 100),
        objective.total_variance / scale.target**2,
        None if objective.input_variance is None else objective.input_variance / scale.input**2,
        scale,
        ranks,
        dead_rows=plain.dead_rows,
    )
    trainer.load_state_tensors_(state)
    return trainer


def step_of(trainer: CoderTrainer, rows: int, ranks: ProcessGroup) -> dict[str, Tensor]:
    """Gradients, metrics and state of a step that updates counters only."""
    x_BD, y_BE = rows_of(trainer.coder.config, rows, 9)
    step_, trainer.optimizers.step_ = trainer.optimizers.step_, lambda: None  # type: ignore[method-assign]
    share = slice(None)
    if ranks.divides_rows:
        share = slice(*((rows * rank + 1) // 2 for rank in (ranks.rank, ranks.rank + 1)))
    result = trainer.step(x_BD[share], y_BE[share])
    named = trainer.coder.named_parameters()
    gradients = {GRADIENT + n: p.grad.clone() for n, p in named if p.grad is not None}
    step_()
    state = {STATE + n: t.clone() for n, t in trainer.state_tensors().items()}
    return gradients | state | {"loss": result.loss, "fvu": result.fvu, "l0": result.l0}


def work(rank: int, folder: Path) -> None:
    """One of two processes: the same steps as `step_of` alone, each on a share of the rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    ranks = ProcessGroup(rank=rank, size=2, spread="rows")
    steps = {
        (config.name, rows): step_of(prepared(config, ranks), rows, ranks)
        for config in CONFIGS
        for rows in (64, 41, 1)
    }
    torch.save(steps, folder / str(rank))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, folder)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / str(rank)) for rank in (0, 1)]


@pytest.mark.parametrize("rows", [64, 41, 1])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_step_of_two_ranks_is_that_of_one_with_the_joint_batch(
    config: CoderConfig, rows: int, shared: list[dict[tuple[str, int], Any]]
) -> None:
    """Batch- coders select within each rank, as one process does within each micro-batch."""
    first, second = (of_rank[config.name, rows] for of_rank in shared)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name}: ranks have parted"
    if config.architecture.has_threshold:
        config = replace(config, micro_batch_rows=-(-rows // 2))
    alone = step_of(prepared(config, SINGLE_PROCESS), rows, SINGLE_PROCESS)
    assert alone.keys() == first.keys()
    for name, tensor in alone.items():
        if name.startswith(STATE) and "rows_since_fired" not in name and "threshold" not in name:
            continue  # an update may enlarge rounding differences
        close = max(2e-5 * float(tensor.abs().max()), 1e-9)
        if not tensor.isnan().all():  # the FVU of one row
            torch.testing.assert_close(first[name], tensor, atol=close, rtol=2e-5, msg=name)
    assert any(float(t.abs().max()) > 0 for n, t in alone.items() if n.startswith(GRADIENT))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_store(tmp_path_factory.mktemp("spread"))[0])


MAIN = "from mpcli.mptrain import main; main()"
# the first process' disk is full once, when it saves
FULL_ONCE = f"""
import errno, os
from mptrain.runs.metrics_file import MetricsFile
flush, fulls = MetricsFile.flush, [OSError(errno.ENOSPC, "No space left on device")]
def flushed(self):
    if fulls and os.environ["RANK"] == "0":
        raise fulls.pop()
    flush(self)
MetricsFile.flush = flushed
{MAIN}
"""


def torchrun(
    store: str, run: Path, *more_options: str, program: str = MAIN, **changes: Any
) -> subprocess.Popen[str]:
    """`mptrain fit` in two processes, with the config of `fits`."""
    config = fits.config(store, run, **changes)
    options = {
        "run": config.run,
        "hookpoints": ",".join(config.hookpoints),
        "kind": ",".join(config.kind),
        **{name: str(getattr(config, name)[0]) for name in ("k", "expansion")},
    }
    for name in (
        "rows", "batch_rows", "window_rows", "log_every", "eval_every", "save_every", "dead_rows",
        "device",
    ):  # fmt: skip
        options[name] = str(getattr(config, name))
    changed = [text for n, value in options.items() for text in (f"--{n.replace('_', '-')}", value)]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"),
            # without the two dashes, torchrun takes --run for an abbreviation of its own option
            *("--nproc-per-node", "2", "--", sys.executable, "-c"),
            program,
            *("fit", store, *changed, *more_options),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_spread_coders_equal_solo_runs_and_continue_where_one_process_stopped(
    store: str, tmp_path: Path
) -> None:
    """Bit for bit, with their metrics and the state of the run."""
    uninterrupted, interrupted = (
        fits.config(store, tmp_path / name) for name in ("whole", "broken")
    )
    fit(uninterrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, on_step=fits.interrupt_at(8))
    process = torchrun(store, tmp_path / "broken", "--spread", "coders")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert out.count("this table is in") == 1, "only the first process tells"
    for read_tensors in (fits.weights, fits.state):
        assert fits.equal(read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "broken"))
    assert fits.lasting(tmp_path / "whole") == fits.lasting(tmp_path / "broken")
    results = [(tmp_path / n / "results.json").read_text() for n in ("whole", "broken")]
    assert results[0].count('"coder"') == results[1].count('"coder"') == 4


@pytest.mark.slow
def test_a_full_disk_of_the_first_process_holds_none_up(store: str, tmp_path: Path) -> None:
    process = torchrun(store, tmp_path / "run", "--spread", "coders", program=FULL_ONCE)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "the next save tries again" in errors


@pytest.mark.slow
def test_shared_rows_train_what_one_process_does(store: str, tmp_path: Path) -> None:
    low = {"lr": (2e-3,)}  # at a high rate, differences of rounding grow
    fit(fits.config(store, tmp_path / "alone", **low))
    process = torchrun(store, tmp_path / "shared", "--spread", "rows", "--lr", "2e-3")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    records = [read_records(tmp_path / n / "metrics.jsonl") for n in ("alone", "shared")]
    assert len(records[0]) == len(records[1])
    for alone, shared in zip(*records, strict=True):
        assert (alone.coder, alone.step, alone.rows, alone.lr) == (
            shared.coder,
            shared.step,
            shared.rows,
            shared.lr,
        )
        assert shared.fvu == pytest.approx(alone.fvu, rel=1e-4 if alone.step <= 2 else 0.05)
        # would be counted twice as fast by ranks that both train on all rows
        assert shared.dead_share == pytest.approx(alone.dead_share, abs=0.05)
    continued = fit(fits.config(store, tmp_path / "shared", **low))
    assert not any(result.diverged for result in continued)


@pytest.mark.slow
@pytest.mark.parametrize("to_rank", [True, False], ids=["one rank", "torchrun"])
def test_a_signal_stops_all_ranks_after_the_same_step(
    store: str, tmp_path: Path, to_rank: bool
) -> None:
    long = {"rows": 64 * 2000, "save_every": 2000, "eval_every": 2000}
    process = torchrun(store, tmp_path / "run", "--spread", "coders", **long)
    metrics = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and read_records(metrics)):
        time.sleep(0.2)
    ranks = [p for p in psutil.Process(process.pid).children() if "fit" in p.cmdline()]
    assert len(ranks) == 2
    (ranks[1] if to_rank else process).send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    (state,) = (f.name for f in (tmp_path / "run/state").iterdir())
    assert 0 < int(state) < 2000, errors
    assert "run the same command again to continue after train step" in errors


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        (
            {"spread": "rows"},
            None,
            "spread rows needs several processes, got one; start them with t",
        ),
        (
            {},
            2,
            "torchrun started 2 processes, but --spread is missing; give --spread rows or "
            "--spread coders",
        ),
        (
            {"spread": "coders"},
            5,
            "got 4 coders for 5 processes; start 4 processes, or use --spread rows",
        ),
        ({"spread": "rows", "device": "cuda:1"}, 2, "device must be auto, cpu or cuda for several"),
    ],
    ids=str,
)
def test_configs_that_do_not_go_with_the_processes(
    changes: dict[str, Any],
    processes: int | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if processes is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setenv("LOCAL_RANK", "0")
    config = fits.config("store", tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=message), join_process_group(config):
        pytest.fail("joined")
