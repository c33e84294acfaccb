"""``vllm-compile-ext report``: where a start went, from what was recorded of it."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_compile_ext.cli import _store
from vllm_compile_ext.cli._store import JsonOption, UserError
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
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where starts are recorded; compile_starts in vLLM's cache root.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show where a start of vLLM went: seconds by phase, what each process did, what was compiled and why."""
    with _store.errors():
        where = read.folder() if folder is None else folder.expanduser().absolute()
        old: Start | None
        if compare is not None:
            if start is not None:
                raise UserError(f"--compare takes two starts, and {start!r} is one more: leave it out")
            if trace is not None:
                raise UserError("--perfetto writes one start: leave --compare out and name it")
            old, new = load(where, compare[0]), load(where, compare[1])
        elif start == "ls":
            if html or trace:
                raise UserError("ls writes no file: name a start instead of it")
            _list(where, as_json=as_json)
            return
        else:
            new = load(where, start or "last")
            old = _previous(new, where)
        _explain_misses(new)
        made = facts.facts(new, old)
        if html:
            _write(html, page.render(made))
        if trace:
            _write(trace, json.dumps(perfetto.trace(made)))
        if as_json and compare and old:
            two = {"a": facts.summary(old), "b": facts.summary(new)}
            typer.echo(json.dumps(two | {name: made[name] for name in ("phases", "different")}, indent=2))
        elif as_json:
            typer.echo(json.dumps(made, indent=2))
        elif html or trace:
            pass
        elif compare and old:
            terminal.show_two(_store.console(), facts.facts(old), made)
        else:
            terminal.show(_store.console(), made)


def load(where: Path, name: str) -> Start:
    """The start that `name` stands for.  Raises `UserError`, and `ReadError` or `OSError` where it cannot be read."""
    path = Path(name).expanduser()
    if name.endswith(read.SUFFIX) or "/" in name or path.is_file():
        if not path.is_file():
            raise UserError(f"there is no file {name!r}: see {_LS}")
        return read.read(path)
    paths = read.recorded(where)
    if not paths:
        raise UserError(
            f"no start is recorded in {where}: start vLLM with VLLM_COMPILE_STARTS=1, its default, "
            "or name another folder with --folder"
        )
    if match := _LAST.fullmatch(name):
        back = int(match[1] or 0)
        if back >= len(paths):
            raise UserError(f"{name!r} goes back too far, {count(len(paths), 'start')} recorded: see {_LS}")
        return read.read(paths[-1 - back])
    exact = where / (name + read.SUFFIX)
    hits = [exact] if exact in paths else [path for path in paths if path.name.startswith(name)]
    if not hits:
        raise UserError(f"no start in {where} has an id that begins with {name!r}: see {_LS}")
    if len(hits) > 1:
        some = ", ".join(path.name.removesuffix(read.SUFFIX) for path in hits[:3]) + (", ..." if len(hits) > 3 else "")
        raise UserError(f"{len(hits)} starts have ids that begin with {name!r}: give more of {some}")
    return read.read(hits[0])


def _previous(start: Start, where: Path) -> Start | None:
    """The start to compare with; None for one that did not get ready, or was recorded elsewhere."""
    if start.ready is None or start.path is None or start.path.parent.absolute() != where:
        return None
    return read.previous(start, where)


def _explain_misses(start: Start) -> None:
    """Add to misses what differs from the closest entry, where the record lacks it: the store keeps the last misses."""
    lacking = [note for note in start.notes if note.name == "miss" and "changes" not in note.attrs]
    # A report needs no store: it may be of another machine.
    with suppress(*_store.EXPECTED):
        known = {miss.key: miss for miss in reversed(misses.read(_store.open_store(None).tree))} if lacking else {}
        for note in lacking:
            miss = known.get(str(note.attrs.get("key")))
            if miss is not None and miss.changes:
                note.attrs.update(closest=miss.closest, changes=[list(change) for change in miss.changes])


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror}") from error
    typer.echo(f"{path}: {size(path.stat().st_size)}", err=True)


def _list(where: Path, *, as_json: bool) -> None:
    lines: list[dict[str, Any]] = []
    unreadable = 0
    for path in reversed(read.recorded(where)):
        try:
            lines.append(facts.summary(read.read(path)))
        except (OSError, ReadError):
            unreadable += 1
    if as_json:
        typer.echo(json.dumps({"folder": str(where), "unreadable": unreadable, "starts": lines}, indent=2))
        return
    out = _store.console()
    if lines:
        out.print(terminal.listing(lines))
    more = f", {count(unreadable, 'file')} cannot be read" if unreadable else ""
    out.print(f"{count(len(lines), 'start')} in {where}{more}", soft_wrap=True)
