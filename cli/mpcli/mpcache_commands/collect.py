"""`mpcache collect`."""

import dataclasses
from typing import Annotated

import typer

from mpcache.config import CollectConfig
from mpcache.parallel.config import CollectParallelConfig
from mpcli.arguments import STORE_HELP, Json
from mpcli.options_from_config import from_config
from mpcli.reports import print_collection
from mpcli.store_to_fill import locate_store
from mpcli.tables import print_json


@from_config(
    CollectConfig,
    CollectParallelConfig,
    arguments=("model", "dataset"),
    first={
        "hookpoints": "layers.10,'layers.*.mlp'",
        "rows": "1M",
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
            help="folder of stores (or s3:// or gs:// URL), instead of STORE; the command "
            "continues the store with the same settings in this folder, or creates a new one "
            "there",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """The same command continues after an interruption, and adds hookpoints or rows to an existing
    store. The exit code is 1 if parts could not be collected.
    """
    from mpcache.collection.collect import collect as run

    location = locate_store(store, root, config)
    try:
        summary = location.summary or run(location.config, location.storage, parallel, quiet=False)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted; finished parts are kept; run the same command again to continue"
        ) from None
    if json:
        print_json(dataclasses.asdict(summary))
    else:
        print_collection(summary)
    if summary.missing:
        raise typer.Exit(1)
