"""`mpcache collect`."""

import dataclasses
from typing import Annotated

import typer

from mpcache.config import CollectConfig
from mpcache.parallel.config import CollectParallelConfig
from mpcli.arguments import STORE_HELP, Json
from mpcli.open_storage import open_storage
from mpcli.options import from_config
from mpcli.reports import print_summary
from mpcli.tables import print_json


@from_config(
    CollectConfig,
    CollectParallelConfig,
    arguments=("model", "dataset"),
    first={
        "hookpoints": "layers.10,'layers.*.mlp'",
        "rows": "10M",
        "ctx_len": "2048",
        "split": "validation",
        "text_column": "messages",
        "dtype": "float16",
        "model_dtype": "float32",
        "device": "cuda:1",
    },
)
def collect(
    config: CollectConfig,
    parallel: CollectParallelConfig,
    store: Annotated[str | None, typer.Argument(metavar="STORE", help=STORE_HELP)] = None,
    root: Annotated[
        str | None,
        typer.Option(
            metavar="ROOT",
            help="in place of STORE: a folder or bucket of stores, in which the store that fits is "
            "found or created",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Exit code 1 if parts could not be collected."""
    from mpcache.collection.collect import collect as run

    place, config, found = open_storage(store, root, config)
    try:
        done = found or run(config, place, parallel, quiet=False)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted; what was committed stays, the same command goes on from there"
        ) from None
    if json:
        print_json(dataclasses.asdict(done))
    else:
        print_summary(done)
    if done.missing:
        raise typer.Exit(1)
