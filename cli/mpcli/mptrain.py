"""`mptrain`: train coders from a store, evaluate and draw them."""

from mpcli.commands import Subcommand, lazy_app
from mpcli.errors import run_app

COMMANDS = {
    "fit": Subcommand(
        "mpcli.mptrain_commands.fit:fit",
        "Train one coder, or a grid of them in one pass over the store.",
        (
            "mptrain fit store --run runs/first --hookpoints layers.6 --k 32 --expansion 16",
            "mptrain fit --resume runs/first",
        ),
    ),
    "presets": Subcommand(
        "mpcli.mptrain_commands.fit:presets",
        "List the named variants for `mptrain fit --preset`, with the options that each sets.",
        ("mptrain presets", "mptrain presets --json"),
    ),
    "save-coders": Subcommand(
        "mpcli.mptrain_commands.fit:save_coders",
        "Save the coders of an unfinished run, as they are in its last saved state.",
        ("mptrain save-coders runs/first", "mptrain save-coders runs/first --device cuda --json"),
    ),
    "eval": Subcommand(
        "mpcli.mptrain_commands.evaluate:evaluate",
        "Evaluate a coder on the validation rows of a store: FVU, L0, dead latents.",
        (
            "mptrain eval runs/first/coders/NAME store --k 16,64",
            "mptrain eval runs/first/coders/NAME store --model EleutherAI/pythia-160m --json",
        ),
    ),
    "plot": Subcommand(
        "mpcli.mptrain_commands.experiments:plot",
        "Draw FVU over training time, with one panel for each hookpoint, kind and K.",
        ("mptrain plot runs/first", "mptrain plot runs/first runs/second --out figures/fvu"),
    ),
    "sweep": Subcommand(
        "mpcli.mptrain_commands.experiments:sweep",
        "Run an experiment file: collect what is missing, train its coders, draw its figures.",
        (
            "mptrain sweep data/experiments/llama-demo.toml --dry-run",
            "mptrain sweep data/experiments/llama-demo.toml --set run.device=cuda:1",
        ),
    ),
    "bench": Subcommand(
        "mpcli.mptrain_commands.bench:bench",
        "Measure time, memory and exactness of the back ends of matching pursuit on this machine.",
        ("mptrain bench", "mptrain bench --width 2048 --latents 32768 --device cuda --json"),
    ),
    "bench-loader": Subcommand(
        "mpcli.mptrain_commands.bench:bench_loader",
        "Measure how fast training reads rows from a store, and how well rows are shuffled.",
        ("mptrain bench-loader store", "mptrain bench-loader store --rows 5M --steps 100 --json"),
    ),
}

app = lazy_app(
    "Train sparse coders (matching pursuit, TopK and others) from a store of activations.",
    "MPTRAIN",
    COMMANDS,
)


def main() -> None:
    """Entry point."""
    run_app(app)
