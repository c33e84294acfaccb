"""``vllm-compile-ext report``: where a start went, from what was recorded of it."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from vllm_compile_ext.cli import shared
from vllm_compile_ext.cli.shared import JsonOption, UserError
from vllm_compile_ext.key import misses
from vllm_compile_ext.record import read
from vllm_compile_ext.record.read import ReadError, Start
from vllm_compile_ext.report import facts, page, perfetto, terminal
from vllm_compile_ext.report.formats import count, size

_LAST = re.compile(r"last(?:~([0-9]{1,6}))?")
_LS = "vllm-compile-ext report ls"


def command(
    start: Annotated[
        str | None,
        typer.Argument(
            metavar="[START]",
            help="An id or enough of its beginning, last, last~1 and so on, or a file; without it the last start. "
            "ls lists them.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page: one file, no network.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--perfetto", metavar="FILE", help="Write a trace for https://ui.perfetto.dev.")
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Compare two starts; --html then shows B next to A.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show where a start of vLLM went: seconds by phase, what each process did, what was compiled and why."""
    old: Start | None = None
    if compare is not None:
        if start is not None:
            raise UserError(f"--compare takes two starts, and {start!r} is one more: leave it out")
        if trace is not None:
            raise UserError("--perfetto writes one start: leave --compare out and name it")
        old, new = map(load, compare)
    elif start == "ls":
        if html or trace:
            raise UserError("ls writes no file: name a start instead of it")
        _list(as_json=as_json)
        return
    else:
        new = load(start or "last")
        if new.ready is not None and new.path in read.recorded():
            old = read.previous(new)
    _explain_misses(new)
    made = facts.facts(new, old)
    if html:
        _write(html, page.render(made))
    if trace:
        _write(trace, json.dumps(perfetto.trace(made)))
    if as_json and compare and old:
        two = {"a": facts.summary(old), "b": facts.summary(new)}
        shared.print_json(two | {name: made[name] for name in ("phases", "different")})
    elif as_json:
        shared.print_json(made)
    elif html or trace:
        pass
    elif compare and old:
        terminal.show_two(shared.console(), facts.facts(old), made)
    else:
        terminal.show(shared.console(), made)


def load(name: str) -> Start:
    """The start that `name` stands for.  Raises `UserError`, and `ReadError` or `OSError` where it cannot be read."""
    path = Path(name).expanduser()
    if name.endswith(read.SUFFIX) or "/" in name or path.is_file():
        return read.read(path.absolute())
    where, paths = read.folder(), read.recorded()
    if not paths:
        raise UserError(f"no start is recorded in {where}: start vLLM with VLLM_COMPILE_STARTS=1, its default")
    if match := _LAST.fullmatch(name):
        back = int(match[1] or 0)
        if back >= len(paths):
            raise UserError(f"{name!r} goes back too far, {count(len(paths), 'start')} recorded: see {_LS}")
        return read.read(paths[-1 - back])
    ids = [path.name.removesuffix(read.SUFFIX) for path in paths if path.name.startswith(name)]
    none = f"no start in {where} has an id that begins with {name!r}: see {_LS}"
    found = shared.only(ids, none, f"starts have ids that begin with {name!r}")
    return read.read(where / f"{found}{read.SUFFIX}")


def _explain_misses(start: Start) -> None:
    """Add to misses what differs from the closest entry, where the store still has it."""
    # A report needs no store: it may be of another machine.
    with suppress(*shared.EXPECTED):
        known = {miss.key: miss for miss in reversed(misses.read(shared.open_store(None).tree))}
        for note in start.notes:
            miss = known.get(str(note.attrs.get("key")))
            if note.name == "miss" and "changes" not in note.attrs and miss is not None and miss.changes:
                note.attrs.update(closest=miss.closest, changes=[list(change) for change in miss.changes])


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")
    typer.echo(f"{path}: {size(path.stat().st_size)}", err=True)


def _list(*, as_json: bool) -> None:
    where, paths, lines = read.folder(), read.recorded(), []
    for path in reversed(paths):
        with suppress(OSError, ReadError):
            lines.append(facts.summary(read.read(path)))
    unreadable = len(paths) - len(lines)
    if as_json:
        shared.print_json({"folder": str(where), "unreadable": unreadable, "starts": lines})
        return
    out = shared.console()
    if lines:
        out.print(terminal.listing(lines))
    more = f", {count(unreadable, 'file')} cannot be read" if unreadable else ""
    out.print(f"{count(len(lines), 'start')} in {where}{more}", soft_wrap=True)
