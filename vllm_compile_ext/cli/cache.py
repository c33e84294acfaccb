"""``vllm-compile-ext cache ls | show | verify | gc | rm``: what is in the store, whether it is whole, what can go."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Column, Table

from vllm_compile_ext.cli import _store
from vllm_compile_ext.cli._store import JsonOption, StoreOption, plain
from vllm_compile_ext.store import evict, kernels
from vllm_compile_ext.store.evict import Removed
from vllm_compile_ext.store.kernels import Kernel
from vllm_compile_ext.store.store import DamagedError, Manifest, Store, total

KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="The key, or enough of its first digits.")]


class Item(msgspec.Struct, kw_only=True):
    """All shards of a key.  size: bytes of their blobs, each counted once; created, used: unix times, the latest."""

    key: str
    kind: str
    model: str
    platform: str
    shards: list[str]
    size: int
    created: float
    used: float
    in_use: bool


def items(store: Store) -> list[Item]:
    """What can be read, the most recently used first."""
    by_key: dict[str, list[Manifest]] = defaultdict(list)
    for entry in store.manifests():
        by_key[entry.key].append(entry)
    return sorted((_item(store, entries) for entries in by_key.values()), key=lambda item: (-item.used, item.key))


def _item(store: Store, entries: list[Manifest]) -> Item:
    first = entries[0]
    return Item(
        key=first.key,
        kind=first.kind,
        model=first.model,
        platform=first.platform,
        shards=[entry.shard for entry in entries],
        size=total(blob for entry in entries for blob in entry.members.values()),
        created=max(entry.created for entry in entries),
        used=max(map(store.used, entries)),
        in_use=any(store.tree.in_use(*entry.names) for entry in entries),
    )


def ls(
    store: StoreOption = None,
    pieces: Annotated[
        bool, typer.Option("--pieces", help="List the pieces too, which models and ranks share.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List what is in the store, the most recently used first."""
    with _store.errors():
        opened = _store.open_store(store)
        found = items(opened)
        listed = [item for item in found if pieces or item.kind != "piece"]
        folded = [item for item in found if item not in listed]
        whole, jit = opened.size(), kernels.size(opened.jit)
        unreadable = len(opened.files()) - sum(len(item.shards) for item in found)
        if as_json:
            data = {"store": str(opened.root), "size": whole, "jit_size": jit, "unreadable": unreadable}
            _store.print_json(data | {"entries": found})
            return
        out = _store.console()
        if listed:
            out.print(_listing(listed, kinds=pieces))
        if folded:
            out.print(
                f"{_store.count(len(folded), 'shared piece')}, {_store.size(sum(i.size for i in folded))} "
                "(--pieces lists them)"
            )
        if unreadable:
            out.print(
                f"{_store.count(unreadable, 'entry', 'entries')} cannot be read: see vllm-compile-ext cache verify"
            )
        out.print(f"{_store.size(whole)} in {opened.root}, and {_store.size(jit)} of kernel caches", soft_wrap=True)


def _listing(found: list[Item], *, kinds: bool) -> Table:
    kind = [Column("kind", no_wrap=True)] if kinds else []
    table = Table(
        Column("key", no_wrap=True),
        *kind,
        Column("model", overflow="fold"),
        Column("shards", justify="right"),
        Column("size", justify="right", no_wrap=True),
        Column("created", no_wrap=True),
        Column("last use", no_wrap=True),
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for item in found:
        name = [plain(item.kind)] if kinds else []
        used = "in use" if item.in_use else f"{_store.ago(item.used)} ago"
        table.add_row(
            item.key[: _store.DIGITS],
            *name,
            plain(item.model),
            str(len(item.shards)),
            _store.size(item.size),
            _store.date(item.created)[:10],
            used,
        )
    return table


def show(key: KeyArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show an entry: what its key was made of, and the members of each shard."""
    with _store.errors():
        opened = _store.open_store(store)
        full = _store.key(opened, key)
        entries = [entry for entry in opened.manifests() if entry.key == full]
        if not entries:
            raise _store.UserError(f"the entry {full} cannot be read: see vllm-compile-ext cache verify")
        item = _item(opened, entries)
        if as_json:
            shards = {e.shard: {"members": e.members} for e in entries}
            _store.print_json(msgspec.to_builtins(item) | {"factors": entries[0].factors, "shards": shards})
            return
        out = _store.console()
        used = "in use" if item.in_use else _store.date(item.used)
        facts = {"key": full, "kind": item.kind, "model": item.model, "platform": item.platform}
        facts |= {"created": _store.date(item.created), "last use": used, "size": _store.size(item.size)}
        out.print(_pairs(facts))
        _section(out, "factors, which the key was made of", entries[0].factors)
        for entry in entries:
            members = {n: f"{b.digest[: _store.DIGITS]}  {_store.size(b.size)}" for n, b in entry.members.items()}
            _section(out, f"{entry.shard}: members", members)


def _section(out: Console, title: str, values: dict[str, str]) -> None:
    if values:
        out.print()
        out.print(title, style="bold")
        out.print(_pairs(values))


def _pairs(values: dict[str, str]) -> Table:
    table = Table(Column(overflow="fold"), Column(overflow="fold"), show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in values.items():
        table.add_row(plain(name), plain(value))
    return table


def verify(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Read everything and check its digests; exit status 1 when something is damaged."""
    with _store.errors():
        opened = _store.open_store(store)
        problems = opened.verify()
        affected = {str(problem.path): _affected(opened, problem) for problem in problems}
        if as_json:
            damaged = [{"path": str(p.path), "problem": str(p), "keys": affected[str(p.path)]} for p in problems]
            _store.print_json({"store": str(opened.root), "damaged": damaged})
        elif not problems:
            entries = _store.count(len(_store.keys(opened)), "entry", "entries")
            typer.echo(f"{entries} and {_store.size(opened.size())} in {opened.root}: all digests match")
        else:
            for problem in problems:
                typer.echo(str(problem))
            typer.echo(_advice(sorted({key for keys in affected.values() for key in keys})))
    if problems:
        raise typer.Exit(1)


def _affected(store: Store, problem: DamagedError) -> list[str]:
    """The keys of the entries that need the damaged file."""
    if problem.path.suffix == ".json":
        return [problem.path.parent.name]
    digest = problem.path.name
    return sorted({e.key for e in store.manifests() if any(b.digest == digest for b in e.members.values())})


def _advice(keys: list[str]) -> str:
    if not keys:
        return "No entry needs what is damaged. Remove it: vllm-compile-ext cache gc, an hour after it was written."
    commands = "".join(f"\n  vllm-compile-ext cache rm {key[: _store.DIGITS]}" for key in keys)
    return (
        "Nothing damaged is ever run: vLLM compiles it again at the next start and replaces it. "
        f"To remove the entries it belongs to:{commands}"
    )


def gc(
    max_gb: Annotated[
        float | None,
        typer.Option(
            min=0, help="Keep at most this many GiB instead of VLLM_COMPILE_STORE_MAX_GB.", show_default=False
        ),
    ] = None,
    max_age: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="Keep what was used since.", show_default=False)
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove the least recently used entries, what no entry needs, and then kernels; nothing that is in use.

    Kernels may have what the entries leave of the limit.  Those used since yesterday stay.
    """
    with _store.errors():
        opened = _store.open_store(store)
        limit = opened.max_bytes if max_gb is None else int(max_gb * 2**30)
        seconds = None if max_age is None else max_age * 86400
        removed = evict.trim(opened, limit, seconds) if opened.root.exists() else Removed([], [], 0)
        left = None if limit is None else max(0, limit - opened.size())
        _report(removed, kernels.trim(opened.jit, left, seconds), as_json=as_json)


def rm(key: KeyArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Remove an entry and what only it needs; exit status 1 when it is in use."""
    with _store.errors():
        opened = _store.open_store(store)
        removed = evict.remove(opened, _store.key(opened, key))
        _report(removed, [], as_json=as_json)
    if removed.in_use:
        raise typer.Exit(1)


def _report(removed: Removed, gone: list[Kernel], *, as_json: bool) -> None:
    freed = removed.freed + sum(kernel.size for kernel in gone)
    if as_json:
        _store.print_json(msgspec.to_builtins(removed) | {"freed": freed, "kernels": len(gone)})
        return
    for name in removed.manifests:
        typer.echo(f"removed {name}")
    for name in removed.in_use:
        typer.echo(f"kept {name}: it is in use")
    if gone:
        typer.echo(f"removed {_store.count(len(gone), 'kernel')}")
    typer.echo(f"{_store.size(freed)} freed")
