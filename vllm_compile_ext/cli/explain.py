"""``vllm-compile-ext explain miss``: why a start compiled what a store might have had."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column, Table

from vllm_compile_ext.cli import shared
from vllm_compile_ext.cli.shared import JsonOption, StoreOption
from vllm_compile_ext.harmless import plain
from vllm_compile_ext.key import misses
from vllm_compile_ext.report.formats import date

_WIDTH = 200  # characters of a value that are shown, from a little before the difference; --json has all


def miss(
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="The key that was missed; without it the last.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what made the last start miss the store: each factor that differs from the closest entry."""
    opened = shared.open_store(store)
    found = next((miss for miss in misses.read(opened.tree) if miss.key.startswith(key or "")), None)
    if as_json:
        shared.print_json({"store": str(opened.root), "miss": found})
        return
    if found is None:
        asked = f" of a key that begins with {key!r}" if key else ""
        typer.echo(f"no miss{asked} is recorded in {opened.root}")
        return
    out = shared.console()
    out.print(plain(misses.summary(found.changes)), style="bold", soft_wrap=True)
    out.print(f"{date(found.time)}, {plain(found.model)}, {plain(found.shard)}", soft_wrap=True)
    out.print(f"wanted   {found.key}", soft_wrap=True)
    if found.closest is not None:
        out.print(f"closest  {found.closest}", soft_wrap=True)
    if found.changes:
        columns = [Column(name, overflow="fold", ratio=r) for name, r in (("factor", 1), ("stored", 2), ("now", 2))]
        table = Table(*columns, show_lines=True, expand=True)
        for name, old, new in found.changes:
            stored, now = misses.shorten(old or "", new or "", _WIDTH)
            cells = "unset" if old is None else stored, "unset" if new is None else now
            table.add_row(plain(name), *map(plain, cells))
        out.print()
        out.print(table)
