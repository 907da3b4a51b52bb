"""Arguments and options that several commands have, each in its one spelling."""

from typing import Annotated

import typer

STORE_HELP = "the store: a folder, or an s3:// or gs:// URL"

StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help=STORE_HELP)]
TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", help="the new store: a folder, or an s3:// or gs:// URL")
]
Json = Annotated[bool, typer.Option("--json", help="print the report as JSON")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="run the Python code that comes with the model; read that code first",
    ),
]
