"""What the commands of `mpcache` print for people."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import typer

from mpcache.validation import printable
from mpcli.tables import print_json


def print_summary(done: Any) -> None:
    if not done.forward_rows:
        typer.echo("everything was there already: no forward pass was needed")
    share = "" if done.share == "1/1" else f", share {done.share}"
    typer.echo(
        f"{done.store}{share}: {done.rows:,} rows in {done.parts} parts, {done.bytes / 1e9:.2f} GB"
        f", {done.forward_rows:,} rows collected now in {done.seconds:.0f} s"
    )
    if done.empty_documents:
        typer.echo(f"{done.empty_documents:,} documents without tokens were left out")
    if done.shortfall:
        typer.echo(f"warning: {done.shortfall}", err=True)
    if done.nonfinite:
        typer.echo(
            f"warning: {done.nonfinite:,} values are not finite; see mpcache stats", err=True
        )
    for part in done.missing:
        typer.echo(f"part {part.part} is missing, tried {part.times} times: {part.cause}", err=True)
    if done.missing:
        typer.echo(
            f"error: {len(done.missing)} parts are missing; the same command tries them again",
            err=True,
        )


def age(entry: dict[str, Any]) -> str:
    """Time since the last commit, in the largest unit that counts at least one."""
    seconds = entry["age_seconds"]
    if seconds is None:
        return "-"
    units = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    name, size = next((unit for unit in units if seconds >= unit[1]), units[-1])
    return f"{seconds / size:.0f} {name}"


def print_moved(verb: str, done: Any, json: bool) -> None:
    if json:
        return print_json(dataclasses.asdict(done))
    typer.echo(
        f"{printable(done.store)}: {done.written} of {done.parts} marks {verb} now, "
        f"{done.bytes / 1e9:.2f} GB"
    )
    if done.nonfinite:
        typer.echo(f"warning: {done.nonfinite:,} values became infinite", err=True)
    return None


def finding_in_full(finding: Any) -> dict[str, Any]:
    return {
        **dataclasses.asdict(finding), "damaging": finding.damaging, "remedy": finding.remedy,
    }  # fmt: skip


def print_findings(findings: Sequence[Any]) -> None:
    for finding in findings:
        typer.echo(printable(f"{finding.fault:12}{finding.path}: {finding.told}"))
    for fault, remedy in dict.fromkeys((f.fault, f.remedy) for f in findings):
        typer.echo(f"-> {fault}: {remedy}")


def document_lines(found: dict[str, Any]) -> list[str]:
    """How the documents of a store became tokens."""
    identity = found["identity"]
    special = "text" if identity.get("special_tokens") == "text" else "parsed as special tokens"
    empty = found["empty_documents"]
    lines = [
        f"names of special tokens in texts: {special}",
        "empty documents: kept" if empty is None else f"empty documents: {empty:,} left out",
    ]
    if identity.get("one_document_per_sequence"):
        lines.append("each document run alone, in pieces")
    if "chat_template" in identity:
        template = str(identity["chat_template"])[:12]
        lines.append(f"chat template {template}; the assistant's tokens are known")
    return [f"documents    {line}" for line in lines]


def pairs(content: dict[str, Any]) -> str:
    return printable(", ".join(f"{k} {v}" for k, v in content.items() if v is not None))
