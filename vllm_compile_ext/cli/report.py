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
from vllm_compile_ext.report import facts, html, perfetto, terminal, words

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
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page: one file, no network.")
    ] = None,
    perfetto_file: Annotated[
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
        if compare is not None:
            if start is not None:
                raise UserError(f"--compare takes two starts, and {start!r} is one more: leave it out")
            _compare(where, *compare, html_file, perfetto_file, as_json=as_json)
        elif start == "ls":
            if html_file or perfetto_file:
                raise UserError("ls writes no file: name a start instead of it")
            _ls(where, as_json=as_json)
        else:
            found = load(where, start or "last")
            _report(found, _previous(found, where), html_file, perfetto_file, as_json=as_json)


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
    match = _LAST.fullmatch(name)
    if match:
        back = int(match[1] or 0)
        if back >= len(paths):
            kept = _store.count(len(paths), "start")
            raise UserError(f"{name!r} goes back too far, {kept} recorded: see {_LS}")
        return read.read(paths[-1 - back])
    hits = [path for path in paths if path.name.startswith(name)]
    exact = [path for path in hits if path.name == name + read.SUFFIX]
    hits = exact or hits
    if not hits:
        raise UserError(f"no start in {where} has an id that begins with {name!r}: see {_LS}")
    if len(hits) > 1:
        some = ", ".join(path.name.removesuffix(read.SUFFIX) for path in hits[:3]) + (", ..." if len(hits) > 3 else "")
        raise UserError(f"{len(hits)} starts have ids that begin with {name!r}: give more of {some}")
    return read.read(hits[0])


def _previous(found: Start, where: Path) -> Start | None:
    """The start to compare with; None for one that did not get ready, or was recorded elsewhere."""
    if found.ready is None or found.path is None or found.path.parent.absolute() != where:
        return None
    return read.previous(found, where)


def _report(
    found: Start, other: Start | None, html_file: Path | None, perfetto_file: Path | None, *, as_json: bool
) -> None:
    made = facts.facts(found, other)
    _explain(made)
    before = facts.facts(other) if other else None
    _write(found, made, html_file, perfetto_file, before)
    if as_json:
        typer.echo(json.dumps(made, indent=2))
    elif not html_file and not perfetto_file:
        terminal.show(_store.console(), made, before)


def _compare(
    where: Path, one: str, two: str, html_file: Path | None, perfetto_file: Path | None, *, as_json: bool
) -> None:
    old, new = load(where, one), load(where, two)
    before, after = facts.facts(old), facts.facts(new, old)
    _explain(after)
    if perfetto_file:
        raise UserError("--perfetto writes one start: leave --compare out and name it")
    _write(new, after, html_file, None, before)
    if as_json:
        names = ("options", "versions", "machine")
        differ = {name: words.different(before[name], after[name]) for name in names}
        data: dict[str, Any] = {"a": facts.summary(old), "b": facts.summary(new), "phases": after["phases"]}
        typer.echo(json.dumps(data | {"different": differ}, indent=2))
    elif not html_file:
        terminal.comparison(_store.console(), before, after)


def _explain(made: dict[str, Any]) -> None:
    """What differs from the closest entry, for misses that were recorded without it: the store keeps the last ones."""
    lacking = [note for note in made["notes"] if note["name"] == "miss" and "changes" not in note["attrs"]]
    if not lacking:
        return
    # A report needs no store: it may be of another machine.
    with suppress(*_store.EXPECTED):
        known = {miss.key: miss for miss in reversed(misses.read(_store.open_store(None).tree))}
        for note in lacking:
            miss = known.get(note["attrs"].get("key"))
            if miss is not None and miss.changes:
                note["attrs"] |= {"closest": miss.closest, "changes": [list(change) for change in miss.changes]}


def _write(
    found: Start,
    made: dict[str, Any],
    html_file: Path | None,
    perfetto_file: Path | None,
    other: dict[str, Any] | None = None,
) -> None:
    if html_file:
        _put(html_file, html.page(made, other))
    if perfetto_file:
        _put(perfetto_file, json.dumps(perfetto.trace(found, made)))


def _put(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror}") from error
    typer.echo(f"{path}: {_store.size(path.stat().st_size)}", err=True)


def _ls(where: Path, *, as_json: bool) -> None:
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
    more = f", {_store.count(unreadable, 'file')} cannot be read" if unreadable else ""
    out.print(f"{_store.count(len(lines), 'start')} in {where}{more}", soft_wrap=True)
