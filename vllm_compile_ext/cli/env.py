"""``vllm-compile-ext env``: the plugin's settings, as `vllm_compile_ext.settings` has them."""

from __future__ import annotations

import os
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

Those with a name in the column `compile_ext` can also be set for one engine, in vLLM's `additional_config`:

```
vllm serve MODEL --additional-config '{"compile_ext": {"cudagraphs": "idle", "wait": 10}}'
vllm serve MODEL --additional-config.compile_ext.cudagraphs idle --additional-config.compile_ext.wait 10
```

There an unknown name, a value that is not allowed, and a variable that is set to another value are errors, before
anything is loaded. The other settings are read before there is a configuration, or concern what engines share (the
store, the record of a start): only their variables set them. Where the plugin is not active, `compile_ext` has no
effect.

| variable | compile_ext | allowed | default | meaning |
|---|---|---|---|---|
"""


def markdown() -> str:
    """The docs page."""
    rows = settings.table()
    return MARKDOWN_HEAD + "".join(
        f"| `{r.name}` | {r.key and f'`{r.key}`'} | {r.allowed} | {r.default} | {r.meaning} |\n" for r in rows
    )


def command(as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the docs page.")] = False) -> None:
    """Print the plugin's environment variables and what they are set to; exit status 1 when a value is not allowed."""
    if as_markdown:
        typer.echo(markdown(), nl=False)
    else:
        table = Table(Column("variable", no_wrap=True), "set to", "meaning", show_lines=True)
        for row in settings.table():
            about = f"{row.meaning}\nAllowed: {row.allowed}; default {row.default}."
            if row.key:
                about += f" For one engine: additional_config.{settings.NAMESPACE}.{row.key}."
            table.add_row(row.name, os.environ.get(row.name, "-"), about)
        Console().print(table)
    settings.load()
