"""``vllm-compile-ext explain miss``: why a start compiled what a store might have had."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from vllm_compile_ext.cli import _store
from vllm_compile_ext.cli._store import JsonOption, StoreOption, plain
from vllm_compile_ext.key import misses
from vllm_compile_ext.key.miss import Change, common, summary

_AROUND = 30  # equal characters shown on both sides of a difference in a long value
_LONG = 120  # characters from which on a value is long
_SHOWN = 600  # characters shown of a difference


def miss(
    key: Annotated[
        str | None,
        typer.Argument(metavar="[KEY]", help="The key that was missed; without it the last.", show_default=False),
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
            out.print()
            out.print(_table(found.changes))


def _table(changes: list[Change]) -> Table:
    table = Table(
        Column("factor", overflow="fold", ratio=1),
        Column("stored", overflow="fold", ratio=2),
        Column("now", overflow="fold", ratio=2),
        show_lines=True,
        expand=True,
    )
    for change in changes:
        table.add_row(plain(change.name), *_values(change.old, change.new))
    return table


def _values(old: str | None, new: str | None) -> tuple[Text, Text]:
    """Both values with what differs in bold; of long ones what differs and a little around it."""
    if old is None or new is None or max(len(old), len(new)) <= _LONG:
        return _whole(old), _whole(new)
    start = common(old, new)
    end = common(old[start:][::-1], new[start:][::-1])
    return _part(old, start, end), _part(new, start, end)


def _whole(value: str | None) -> Text:
    return Text("unset", style="italic") if value is None else Text(plain(value))


def _part(value: str, start: int, end: int) -> Text:
    """`value` around the part that begins at `start` and ends `end` characters before its end."""
    stop = len(value) - end
    before, middle, after = value[:start], value[start:stop], value[stop:]
    left = len(middle) - _SHOWN
    text = Text("…" if len(before) > _AROUND else "")
    text.append(plain(before[-_AROUND:]))
    text.append(plain(middle[:_SHOWN]), style="bold")
    if left > 0:
        text.append(f"…\n({left} more characters: --json)")
    else:
        text.append(plain(after[:_AROUND]) + ("…" if len(after) > _AROUND else ""))
    return text
