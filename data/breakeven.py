"""From how many fits on a store pays: collecting once, against running the model for each fit.

    python data/breakeven.py           # the demo model, and a random one of 135 M parameters
    python data/breakeven.py --model M --dataset D --hookpoints layers.10 --rows 200000

Measured: seconds of a whole collection, of fits from its store, and of the bare forward pass up to
the deepest hookpoint on the same rows. A fit that runs the model itself is taken to cost loading
it, that forward pass, and its own training and validation: nothing for tokens, for shuffling or
for moving activations, so the store is not favoured. On other numbers of rows, all but loading and
what a collection does once grows in proportion.
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
from mptrain.config.fit import FitConfig
from mptrain.kernels.device import resolve_device
from mptrain.runs.fit import fit
from mptrain.runs.metrics import read_records

HERE = Path(__file__).parent
GRIDS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds on the same rows."""

    parameters: int
    rows: int
    coders: int
    load: float
    "of the model's weights alone"
    collect: float
    "a whole collection: loading, digests and tokens too"
    forward: float
    fit: float
    "from the store, a whole run; the mean of the fits that were timed"
    wait: float
    "of it, for data"

    @property
    def live(self) -> float:
        """A fit that runs the model: what it does not wait for a store, it computes."""
        return self.load + self.forward + self.fit - self.wait

    @property
    def breakeven(self) -> float:
        """Least number of fits from which the store is not slower; infinite: never."""
        saved = self.live - self.fit
        return self.collect / saved if saved > 0 else float("inf")


def measure(config: CollectConfig, fits: int, batch_rows: int) -> Costs:
    """Collect, fit `fits` times with other seeds, and run the bare model."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        began = time.perf_counter()
        collect(config, store)
        collected = time.perf_counter() - began
        rates = bench(config, repeats=1)
        waits, seconds, coders = [], [], 0
        for seed in range(fits):
            run = Path(folder) / str(seed)
            began = time.perf_counter()
            results = fit(_fit_config(config, store, run, seed, batch_rows))
            seconds.append(time.perf_counter() - began)
            waits.append(max(r.wait_seconds for r in read_records(run / "metrics.jsonl")))
            coders = len(results)
    began = time.perf_counter()
    model = AutoModel.from_pretrained(config.model)
    loaded = time.perf_counter() - began
    return Costs(
        parameters=sum(p.numel() for p in model.parameters()),
        rows=rates.rows,
        coders=coders,
        load=loaded,
        collect=collected,
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


def told(name: str, one: Costs) -> str:
    """A model's seconds, and totals for numbers of fits, from the store and with the model."""
    names = ("load", "collect", "forward", "fit", "wait", "live")
    seconds = ", ".join(f"{n} {getattr(one, n):.4g}" for n in names)
    lines = [
        f"{name}: {one.parameters:,} parameters, {one.rows:,} rows, {one.coders} coders",
        f"  seconds: {seconds}; a store pays from {one.breakeven:.3g} fits on",
    ]
    for n in GRIDS:
        stored, live = one.collect + n * one.fit, n * one.live
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
    parser.add_argument("--hookpoints", default="layers.5")
    parser.add_argument("--rows", type=int, default=131_072)
    parser.add_argument("--random-hookpoints", default="layers.20")
    parser.add_argument("--random-rows", type=int, default=32_768)
    parser.add_argument("--ctx-len", type=int, default=256)
    parser.add_argument("--part-rows", type=int, default=4096)
    parser.add_argument("--batch-rows", type=int, default=1024)
    parser.add_argument("--fits", type=int, default=2, help="fits that are timed")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()

    def costs(model: Path | str, hookpoints: str, rows: int) -> Costs:
        config = CollectConfig(
            model=str(model),
            dataset=asked.dataset,
            hookpoints=tuple(hookpoints.split(",")),
            rows=rows,
            ctx_len=asked.ctx_len,
            part_rows=asked.part_rows,
            chunk_rows=min(1024, asked.part_rows),
            validation_every=8,
        )
        return measure(config, asked.fits, asked.batch_rows)

    def report(name: str, one: Costs) -> None:
        values = {"model": name, **vars(one), "live": one.live, "breakeven": one.breakeven}
        print(json.dumps(values) if asked.json else told(name, one), flush=True)  # noqa: T201

    if not asked.json:
        print(hardware(resolve_device("auto")))  # noqa: T201  a script's report
    if asked.model:
        report(asked.model, costs(asked.model, asked.hookpoints, asked.rows))
        return
    report("demo", costs(HERE / "model", asked.hookpoints, asked.rows))
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder))
        report("random", costs(model, asked.random_hookpoints, asked.random_rows))


if __name__ == "__main__":
    main()
