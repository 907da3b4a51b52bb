"""`mptrain eval`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from mpcli.arguments import Json, StoreArgument
from mpcli.options_from_config import from_config
from mpcli.spliced import spliced_figures
from mpcli.tables import print_json, print_table
from mptrain.config.coder_settings import Codes
from mptrain.config.run import ReadCacheSettings


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """The rows of an evaluation."""

    group: ClassVar[str] = "Data"

    rows: int | None = None
    "validation rows to evaluate on; default: all validation rows of the store"


@dataclass(frozen=True, kw_only=True)
class LanguageModelOptions:
    """The language model into which the coder is spliced."""

    group: ClassVar[str] = "Model"

    model: str | None = None
    (
        "also evaluate the store's language model with the coder in it: Hugging Face id, local "
        "folder or .gguf file"
    )
    revision: str = "main"
    "branch, tag or commit of a Hugging Face model"
    trust_remote_code: bool = False
    "run the Python code that comes with the model; read that code first"


@dataclass(frozen=True, kw_only=True)
class VariantOptions:
    """Other ways of coding the rows, each one more line of the report."""

    group: ClassVar[str] = "Evaluation"

    k: tuple[int, ...] = ()
    "also evaluate the coder with each of these values of K; each adds a line to the report"
    codes: tuple[Codes, ...] = ()
    (
        "arch mp only: also evaluate with latent values from mp (matching pursuit), gp (gradient "
        "pursuit) or omp (orthogonal matching pursuit)"
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RowOptions, ReadCacheSettings, LanguageModelOptions, VariantOptions):
    """The options of `mptrain eval`."""

    device: str = "auto"
    "torch device of coder and model; auto: the first GPU, or the CPU if there is no GPU"


@from_config(EvaluateOptions)
def evaluate(
    options: EvaluateOptions,
    coder: Annotated[
        Path, typer.Argument(metavar="CODER", help="folder of the trained coder: RUN/coders/NAME")
    ],
    store: StoreArgument,
    json: Json = False,
) -> None:
    """With --model, the coder replaces its hookpoint's output in the language model. The report
    then has the cross-entropy loss and the KL divergence of the next token; for a bidirectional
    model, of tokens that are masked as in BERT's training (masked_*).
    """
    from mptrain.evals.evaluate import evaluate_coder
    from mptrain.runs.results import l0_warnings

    evaluations = evaluate_coder(
        coder,
        store,
        options.k,
        options.rows,
        options.device,
        options.codes,
        cache_dir=options.cache_dir,
        cache_bytes=options.cache_bytes,
    )
    for warning in l0_warnings(coder, evaluations):
        typer.echo(f"warning: {warning}", err=True)
    rows = [dataclasses.asdict(evaluation) for evaluation in evaluations]
    in_model = None
    if options.model is not None:
        in_model = spliced_figures(
            coder,
            store,
            options.model,
            options.revision,
            options.device,
            options.trust_remote_code,
        )
    if json:
        return print_json({"rows": rows, "model": in_model})
    print_table(tuple(rows[0]), rows)
    if in_model is not None:
        print_table(tuple(in_model), [in_model])
    return None
