"""Make the golden store of the current format version: `python -m tests.helpers.golden`.

Run once for each new version, and never to make a failing test pass: the golden store is of use
because the code of its time wrote it. Version 1 was made so before version 2 existed.
`fit-v1.safetensors` has the weights that the code of version 1 trained on the store of version 1.
"""

import json
import re
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mpcache.store.part_layout import FLAGS_VERSION
from mpcache.store.reader import Store, open_store
from mptrain.config.coder_grid import FitConfig
from mptrain.runs.fit import fit
from tests.helpers.chats import chat_store
from tests.helpers.paths import GOLDEN

FOLDER = GOLDEN
ARRAYS = ("tokens", "rows/position", "acts/layers.0/output")


def machine() -> dict[str, str]:
    """The versions that the last bits of trained weights depend on: torch and processor model."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    about = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    keys = ("cpu family", "model", "model name", "stepping", "cache size")
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": ", ".join(about.get(key, "?") for key in keys),
    }


def sums(store: Store) -> dict[str, int]:
    """Sums of the stored unsigned integers of each part, exact and independent of floats."""
    return {
        f"{part} {name}": int(values.astype("uint64").sum())
        for array in ARRAYS
        for part in store.part_numbers(array)
        for name, values in store.read_part(array, part).items()
        if values.dtype.kind == "u"
    }


_LR = 2e-3  # the default of version 1


def fitted(store: Path, run: Path) -> dict[str, Tensor]:
    """The weights of two small coders, trained by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = FitConfig(
        store=str(store), run=str(run), hookpoints=("layers.0",), kind=("sae",),
        arch=("mp", "topk"), k=(2,), expansion=(2,), rows=256, batch_rows=32, window_rows=64,
        eval_rows=32, save_every=10**6, device="cpu", lr=(_LR,), optimizer="muon",
        warmup_share=0.02, auxk_alpha=1 / 32, dead_rows=10**6, normalise=False,
    )  # fmt: skip
    try:
        fit(config)
    finally:
        torch.set_num_threads(threads)
    files = sorted((run / "coders").glob("*/coder.safetensors"))
    named = {file.parent.name.partition("-lr")[0]: file for file in files}
    return {f"{coder}/{name}": w for coder, f in named.items() for name, w in load_file(f).items()}


def main() -> None:
    target = FOLDER / f"store-v{FLAGS_VERSION}"
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        collected, _ = chat_store(
            Path(folder), hookpoints=("layers.0",), rows=640, part_rows=320, codec="zstd",
            one_document_per_sequence=True, chats=14,
        )  # fmt: skip
        shutil.copytree(collected, target)
    target.with_suffix(".json").write_text(json.dumps(sums(open_store(target)), indent=1) + "\n")


if __name__ == "__main__":
    main()
