"""What the commands of `mpcache` print for people."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from mpcache.untrusted_names import printable
from mpcli.tables import print_json

if TYPE_CHECKING:  # their modules import torch, and help must not
    from mpcache.collection.summary import CollectSummary
    from mpcache.maintenance.copy import CopySummary
    from mpcache.maintenance.findings import Finding


def print_collection(summary: "CollectSummary") -> None:
    """What a collection did, and warnings about what its store lacks."""
    if not summary.forward_rows:
        typer.echo("the store already has all requested rows; the model did not run")
    share = "" if summary.share == "1/1" else f", share {summary.share}"
    typer.echo(
        f"{summary.store}{share}: {summary.rows:,} rows in {summary.parts} parts, "
        f"{summary.bytes / 1e9:.2f} GB, {summary.forward_rows:,} rows collected now in "
        f"{summary.seconds:.0f} s"
    )
    if summary.empty_documents:
        typer.echo(f"{summary.empty_documents:,} documents without tokens were skipped")
    if summary.shortfall:
        typer.echo(f"warning: {summary.shortfall}", err=True)
    if summary.nonfinite:
        typer.echo(
            f"warning: {summary.nonfinite:,} stored values are NaN or infinite; "
            "`mpcache stats STORE` shows where",
            err=True,
        )
    for part in summary.missing:
        typer.echo(
            f"part {part.part} was not collected after {part.times} tries: {part.cause}", err=True
        )
    if summary.missing:
        typer.echo(
            f"error: {len(summary.missing)} parts are missing; run the same command again to "
            "collect them",
            err=True,
        )


def format_age(seconds: float | None) -> str:
    """A time in the largest unit that it fills at least once, such as `3 h`."""
    if seconds is None:
        return "-"
    units = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    name, size = next((unit for unit in units if seconds >= unit[1]), units[-1])
    return f"{seconds / size:.0f} {name}"


def print_copy(verb: str, summary: "CopySummary", json: bool) -> None:
    """What a copy or a conversion did."""
    if json:
        return print_json(dataclasses.asdict(summary))
    typer.echo(
        f"{printable(summary.store)}: {summary.written} of {summary.parts} parts of arrays {verb} "
        f"now, {summary.bytes / 1e9:.2f} GB"
    )
    if summary.nonfinite:
        typer.echo(
            f"warning: {summary.nonfinite:,} values became infinite: they are too large for the "
            "new dtype; use --dtype bfloat16 or float32",
            err=True,
        )
    return None


def finding_as_json(finding: "Finding") -> dict[str, Any]:
    """A finding with what follows from it."""
    return {
        **dataclasses.asdict(finding), "is_damage": finding.is_damage, "remedy": finding.remedy,
    }  # fmt: skip


def print_findings(findings: Sequence["Finding"]) -> None:
    """A line for each finding, and then a line for each remedy."""
    for finding in findings:
        typer.echo(printable(f"{finding.fault:12}{finding.path}: {finding.message}"))
    for fault, remedy in dict.fromkeys((f.fault, f.remedy) for f in findings):
        typer.echo(f"-> {fault}: {remedy}")


def document_lines(info: dict[str, Any]) -> list[str]:
    """How the documents of a store became tokens."""
    identity = info["identity"]
    special = "text" if identity.get("special_tokens") == "text" else "parsed as special tokens"
    empty = info["empty_documents"]
    lines = [
        f"names of special tokens in texts: {special}",
        "empty documents: kept" if empty is None else f"empty documents: {empty:,} left out",
    ]
    if identity.get("one_document_per_sequence"):
        lines.append("each document run alone, in pieces")
    if "chat_template" in identity:
        template = str(identity["chat_template"])[:12]
        lines.append(f"chat template {template}; the assistant's tokens are marked")
    return [f"documents    {line}" for line in lines]


def format_pairs(content: dict[str, Any]) -> str:
    """Keys and values on one line, without those that are None."""
    return printable(", ".join(f"{k} {v}" for k, v in content.items() if v is not None))
