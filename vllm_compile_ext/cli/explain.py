"""``vllm-compile-ext explain miss``: why a start compiled what a store might have had."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from vllm_compile_ext.cli import _store
from vllm_compile_ext.cli._store import JsonOption, StoreOption, plain
from vllm_compile_ext.key import misses
from vllm_compile_ext.key.misses import Change, common, summary

_AROUND = 30  # equal characters shown on both sides of a difference in a long value
_LONG = 120  # characters from which on a value is long
_SHOWN = 600  # characters shown of a difference


def miss(
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="The key that was missed; without it the last.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what made the last start miss the store: each factor that differs from the closest entry."""
    with _store.errors():
        opened = _store.open_store(store)
        found = next((miss for miss in misses.read(opened.tree) if miss.key.startswith(key or "")), None)
        if as_json:
            _store.print_json({"store": str(opened.root), "miss": found})
            return
        if found is None:
            of = f" of a key that begins with {key!r}" if key else ""
            typer.echo(f"no miss{of} is recorded in {opened.root}")
            return
        out = _store.console()
        out.print(plain(summary(found.changes)), style="bold", soft_wrap=True)
        out.print(f"{_store.date(found.time)}, {plain(found.model)}, {plain(found.shard)}", soft_wrap=True)
        out.print(f"wanted   {found.key}", soft_wrap=True)
        if found.closest is not None:
            out.print(f"closest  {found.closest}", soft_wrap=True)
        if found.changes:
            columns = [Column(name, overflow="fold", ratio=r) for name, r in (("factor", 1), ("stored", 2), ("now", 2))]
            table = Table(*columns, show_lines=True, expand=True)
            for change in found.changes:
                table.add_row(plain(change.name), *_cells(change))
            out.print()
            out.print(table)


def _cells(change: Change) -> list[Text]:
    """Both values; of long ones what differs, in bold, and a little around it."""
    old, new = change.old, change.new
    if old is None or new is None or max(len(old), len(new)) <= _LONG:
        return [Text("unset", style="italic") if v is None else Text(plain(v)) for v in (old, new)]
    start = common(old, new)
    end = common(old[start:][::-1], new[start:][::-1])
    return [_part(value, start, len(value) - end) for value in (old, new)]


def _part(value: str, start: int, stop: int) -> Text:
    before, middle, after = value[:start], value[start:stop], value[stop:]
    text = Text("…" if len(before) > _AROUND else "")
    text.append(plain(before[-_AROUND:]))
    text.append(plain(middle[:_SHOWN]), style="bold")
    if len(middle) > _SHOWN:
        return text.append(f"…\n({len(middle) - _SHOWN} more characters: --json)")
    return text.append(plain(after[:_AROUND]) + ("…" if len(after) > _AROUND else ""))
