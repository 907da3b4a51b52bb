"""From how many fits a store pays off: collect once, or run the model for each fit.

    python data/breakeven.py           # the demo model, and a random one of 135 M parameters
    python data/breakeven.py --model M --dataset D --hookpoints layers.10 --rows 200000

The script measures a whole collection, fits from its store, and the bare forward pass up to the
deepest hookpoint on the same rows. A fit that runs the model itself is assumed to cost the loading
of the model, that forward pass, and its own training and validation. It is assumed to need no time
for tokens, for shuffling and for moving activations, so the comparison does not favor the store. On
other numbers of rows, all times grow in proportion, except loading and the start of a collection.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, LlamaConfig

from mpcache.bench.collect import bench
from mpcache.bench.hardware import hardware
from mpcache.collection.collect import collect
from mpcache.config import CollectConfig
from mptrain.config.coder_grid import FitConfig
from mptrain.kernels.device import resolve_device
from mptrain.runs.fit import fit
from mptrain.runs.metrics_file import read_records

HERE = Path(__file__).parent
GRIDS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of each way to train, on the same rows."""

    parameters: int
    rows: int
    coders: int
    load: float
    "loading the model's weights"
    collect: float
    "a whole collection, with loading, digests and tokens"
    forward: float
    "forward passes up to the deepest hookpoint"
    fit: float
    "a whole run from the store, mean over the timed fits"
    wait: float
    "part of `fit` that waits for data"

    @property
    def live(self) -> float:
        """A fit that runs the model, which replaces waiting for the store by forward passes."""
        return self.load + self.forward + self.fit - self.wait

    @property
    def breakeven(self) -> float:
        """Least number of fits for which the store is not slower; infinite: never."""
        saved = self.live - self.fit
        return self.collect / saved if saved > 0 else float("inf")


def measure(config: CollectConfig, fits: int, batch_rows: int) -> Costs:
    """Collect, fit `fits` times with different seeds, and run the bare model."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        start = time.perf_counter()
        collect(config, store)
        collect_seconds = time.perf_counter() - start
        rates = bench(config, repeats=1)
        waits, seconds, coders = [], [], 0
        for seed in range(fits):
            run = Path(folder) / str(seed)
            start = time.perf_counter()
            results = fit(_fit_config(config, store, run, seed, batch_rows))
            seconds.append(time.perf_counter() - start)
            waits.append(max(r.wait_seconds for r in read_records(run / "metrics.jsonl")))
            coders = len(results)
    start = time.perf_counter()
    model = AutoModel.from_pretrained(config.model)
    load_seconds = time.perf_counter() - start
    return Costs(
        parameters=sum(p.numel() for p in model.parameters()),
        rows=rates.rows,
        coders=coders,
        load=load_seconds,
        collect=collect_seconds,
        forward=rates.rows / rates.forward_rows_per_second,
        fit=sum(seconds) / fits,
        wait=sum(waits) / fits,
    )


def _fit_config(
    config: CollectConfig, store: Path, run: Path, seed: int, batch_rows: int
) -> FitConfig:
    """A pair of coders for each hookpoint, on about as many rows as there are to train on."""
    rows = config.rows - config.rows // config.validation_every - config.part_rows
    return FitConfig(
        store=str(store),
        run=str(run),
        hookpoints=config.hookpoints,
        k=(16,),
        expansion=(8,),
        rows=max(batch_rows, rows),
        batch_rows=batch_rows,
        eval_rows=4096,
        seed=(seed,),
    )


def random_model(folder: Path) -> Path:
    """SmolLM2-135M's architecture with random weights, and the demo model's tokenizer."""
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, intermediate_size=1536, max_position_embeddings=2048,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(HERE / "model").save_pretrained(folder)
    return folder


def report_text(name: str, costs: Costs) -> str:
    """Seconds of a model, and totals for several numbers of fits, from the store and without it."""
    names = ("load", "collect", "forward", "fit", "wait", "live")
    seconds = ", ".join(f"{n} {getattr(costs, n):.4g}" for n in names)
    lines = [
        f"{name}: {costs.parameters:,} parameters, {costs.rows:,} rows, {costs.coders} coders",
        f"  seconds: {seconds}; a store pays off from {costs.breakeven:.3g} fits on",
    ]
    for n in GRIDS:
        stored, live = costs.collect + n * costs.fit, n * costs.live
        lines.append(
            f"  {n:2d} fits: {stored:.4g} s from a store, {live:.4g} s running the model, "
            f"ratio {stored / live:.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the demo model and a random one")
    parser.add_argument("--dataset", default=str(HERE / "corpus/train.parquet"))
    parser.add_argument("--hookpoints", default="layers.5", help="of --model or the demo model")
    parser.add_argument("--rows", type=int, default=131_072)
    parser.add_argument("--random-hookpoints", default="layers.20", help="of the random model")
    parser.add_argument("--random-rows", type=int, default=32_768)
    parser.add_argument("--ctx-len", type=int, default=256)
    parser.add_argument("--part-rows", type=int, default=4096)
    parser.add_argument("--batch-rows", type=int, default=1024)
    parser.add_argument("--fits", type=int, default=2, help="number of timed fits")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    def measure_model(model: Path | str, hookpoints: str, rows: int) -> Costs:
        config = CollectConfig(
            model=str(model),
            dataset=options.dataset,
            hookpoints=tuple(hookpoints.split(",")),
            rows=rows,
            ctx_len=options.ctx_len,
            part_rows=options.part_rows,
            chunk_rows=min(1024, options.part_rows),
            validation_every=8,
        )
        return measure(config, options.fits, options.batch_rows)

    def report(name: str, costs: Costs) -> None:
        values = {"model": name, **vars(costs), "live": costs.live, "breakeven": costs.breakeven}
        print(json.dumps(values) if options.json else report_text(name, costs), flush=True)  # noqa: T201

    if not options.json:
        print(hardware(resolve_device("auto")))  # noqa: T201  a script's report
    if options.model:
        report(options.model, measure_model(options.model, options.hookpoints, options.rows))
        return
    report("demo", measure_model(HERE / "model", options.hookpoints, options.rows))
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder))
        report("random", measure_model(model, options.random_hookpoints, options.random_rows))


if __name__ == "__main__":
    main()
