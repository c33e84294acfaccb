"""``vllm-compile-ext env``: the plugin's environment variables, as `vllm_compile_ext.settings` has them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from vllm_compile_ext import settings

MARKDOWN_HEAD = """\
# Environment variables

Made by `vllm-compile-ext env --markdown` from `vllm_compile_ext/settings.py`; do not edit.

A variable that vLLM itself knows keeps vLLM's meaning. A value that is not allowed is reported in one line that names
the variable, the value and what is allowed, and vLLM starts stock; with `VLLM_COMPILE_EXT_STRICT=1` it is an error.
None of them changes compiled code: all stay out of vLLM's compile cache key.
"""


def markdown() -> str:
    """The table as the docs page."""
    lines = [
        MARKDOWN_HEAD,
        "| variable | allowed | default | meaning |",
        "|---|---|---|---|",
    ]
    for row in settings.table():
        lines.append(f"| `{row.name}` | {row.allowed} | {row.default} | {row.meaning} |")
    return "\n".join(lines) + "\n"


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the docs page.")] = False,
) -> None:
    """Print the plugin's environment variables and what they are set to; exit status 1 when a value is not allowed."""
    problem = None
    try:
        settings.load()
    except settings.EnvError as error:
        problem = str(error)
    if as_markdown:
        typer.echo(markdown(), nl=False)
    elif as_json:
        rows = [asdict(row) | {"set": os.environ.get(row.name)} for row in settings.table()]
        typer.echo(json.dumps({"variables": rows, "problem": problem}, indent=2))
    else:
        table = Table(Column("variable", no_wrap=True), "set to", "meaning", show_lines=True)
        for row in settings.table():
            about = f"{row.meaning}\nAllowed: {row.allowed}; default {row.default}."
            table.add_row(row.name, os.environ.get(row.name, "-"), about)
        Console().print(table)
    if problem:
        typer.echo(problem, err=True)
        raise typer.Exit(1)
