"""`mpcache`: collect activations, and look after stores."""

from mpcli.commands import Subcommand, lazy_app
from mpcli.errors import run_app

COMMANDS = {
    "collect": Subcommand(
        "mpcli.mpcache_commands.collect:collect",
        "Run a model on a dataset and write its activations to a store.",
        (
            "mpcache collect EleutherAI/pythia-160m NeelNanda/pile-10k store "
            "--hookpoints layers.6 --rows 1M",
            "mpcache collect model.gguf 'texts/*.jsonl' s3://bucket/store "
            "--hookpoints 'layers.*.mlp'",
        ),
    ),
    "hookpoints": Subcommand(
        "mpcli.mpcache_commands.hookpoints:hookpoints",
        "List what can be collected from a model: hookpoints, widths and bytes per row.",
        ("mpcache hookpoints EleutherAI/pythia-160m", "mpcache hookpoints model.gguf --json"),
    ),
    "list": Subcommand(
        "mpcli.mpcache_commands.stores:list_stores",
        "List the stores in a folder or bucket: model, dataset, rows, bytes, completeness, age.",
        ("mpcache list stores", "mpcache list s3://bucket/stores --json"),
    ),
    "info": Subcommand(
        "mpcli.mpcache_commands.stores:info",
        "Show one store: model and dataset, hookpoints, rows, bytes and parts.",
        ("mpcache info store", "mpcache info s3://bucket/store --json"),
    ),
    "verify": Subcommand(
        "mpcli.mpcache_commands.maintenance:verify",
        "Check every byte of a store; the exit code is 1 if stored data is damaged.",
        ("mpcache verify store", "mpcache verify s3://bucket/store --workers 4 --json"),
    ),
    "repair": Subcommand(
        "mpcli.mpcache_commands.maintenance:repair",
        "Verify a store and restore damaged data; the exit code is 1 if damage remains.",
        ("mpcache repair store", "mpcache repair store --source s3://bucket/copy-of-store"),
    ),
    "stats": Subcommand(
        "mpcli.mpcache_commands.maintenance:stats",
        "Show mean, variance, norms, outlier dimensions and non-finite counts per hookpoint.",
        ("mpcache stats store", "mpcache stats store --out moments.safetensors --threads 8"),
    ),
    "copy": Subcommand(
        "mpcli.mpcache_commands.maintenance:copy",
        "Copy a store and check each byte; the same command continues after an interruption.",
        ("mpcache copy store s3://bucket/store", "mpcache copy gs://bucket/store store --json"),
    ),
    "convert": Subcommand(
        "mpcli.mpcache_commands.maintenance:convert",
        "Rewrite a store with another dtype, codec, chunk or part size, or fewer hookpoints.",
        (
            "mpcache convert store small --hookpoints layers.6 --codec zstd",
            "mpcache convert store fp16 --dtype float16 --chunk-rows 4096",
        ),
    ),
    "remove": Subcommand(
        "mpcli.mpcache_commands.stores:remove",
        "Delete a store for good; the command asks for confirmation first.",
        ("mpcache remove store", "mpcache remove s3://bucket/store --yes"),
    ),
    "bench": Subcommand(
        "mpcli.mpcache_commands.bench:bench",
        "Measure the rows per second of a collection, compared with the forward pass alone.",
        (
            "mpcache bench EleutherAI/pythia-160m texts.jsonl --hookpoints layers.6 --rows 100k",
            "mpcache bench model texts.jsonl --hookpoints 'layers.*' --rows 1M --json",
        ),
    ),
    "bench-store": Subcommand(
        "mpcli.mpcache_commands.bench:bench_store",
        "Measure how many rows per second are written to and read from a store.",
        (
            "mpcache bench-store --width 768 --codec none,zstd",
            "mpcache bench-store --folder /mnt/disk --chunk-rows 256,1024,4096 --json",
        ),
    ),
}

app = lazy_app(
    "Run a language model once and keep its activations in a Zarr store.", "MPCACHE", COMMANDS
)


def main() -> None:
    """Entry point."""
    run_app(app)
