"""``vllm-compile-ext cache``: what is in the store, whether it is whole, what can go, and how it gets elsewhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Column, Table

from vllm_compile_ext import platforms
from vllm_compile_ext.cli import shared
from vllm_compile_ext.cli.shared import DIGITS, JsonOption, StoreOption
from vllm_compile_ext.harmless import plain
from vllm_compile_ext.report.formats import ago, count, date, size
from vllm_compile_ext.store import bundle, evict, kernels
from vllm_compile_ext.store.bundle import Bundle
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


def items(store: Store, entries: Iterable[Manifest]) -> list[Item]:
    """The entries by key, the most recently used first."""
    by_key: dict[str, list[Manifest]] = defaultdict(list)
    for entry in entries:
        by_key[entry.key].append(entry)
    found = [
        Item(
            key=key,
            kind=shards[0].kind,
            model=shards[0].model,
            platform=shards[0].platform,
            shards=[entry.shard for entry in shards],
            size=total(blob for entry in shards for blob in entry.members.values()),
            created=max(entry.created for entry in shards),
            used=max(map(store.used, shards)),
            in_use=any(store.tree.in_use(*entry.names) for entry in shards),
        )
        for key, shards in by_key.items()
    ]
    return sorted(found, key=lambda item: (-item.used, item.key))


def ls(
    store: StoreOption = None,
    pieces: Annotated[
        bool, typer.Option("--pieces", help="List the pieces too, which models and ranks share.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List what is in the store, the most recently used first."""
    opened = shared.open_store(store)
    found = items(opened, opened.manifests())
    whole, jit = opened.size(), kernels.size(opened.jit)
    unreadable = len(opened.files()) - sum(len(item.shards) for item in found)
    if as_json:
        data = {"store": str(opened.root), "size": whole, "jit_size": jit, "unreadable": unreadable}
        shared.print_json(data | {"entries": found})
        return
    out = shared.console()
    listed = [item for item in found if pieces or item.kind != "piece"]
    if listed:
        out.print(_listing(listed, kinds=pieces))
    folded = [item.size for item in found if item not in listed]
    if folded:
        out.print(f"{count(len(folded), 'shared piece')}, {size(sum(folded))} (--pieces lists them)")
    if unreadable:
        out.print(f"{count(unreadable, 'entry', 'entries')} cannot be read: see vllm-compile-ext cache verify")
    out.print(f"{size(whole)} in {opened.root}, and {size(jit)} of kernel caches", soft_wrap=True)


def _listing(found: list[Item], *, kinds: bool) -> Table:
    table = Table(
        Column("key", no_wrap=True),
        *([Column("kind", no_wrap=True)] if kinds else []),
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
        names = [plain(item.kind), plain(item.model)] if kinds else [plain(item.model)]
        used = "in use" if item.in_use else f"{ago(item.used)} ago"
        created = date(item.created)[:10]
        table.add_row(item.key[:DIGITS], *names, str(len(item.shards)), size(item.size), created, used)
    return table


def show(key: KeyArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show an entry: what its key was made of, and the members of each shard."""
    opened = shared.open_store(store)
    full = shared.key(opened, key)
    entries = [entry for entry in opened.manifests() if entry.key == full]
    if not entries:
        raise shared.UserError(f"the entry {full} cannot be read: see vllm-compile-ext cache verify")
    (item,) = items(opened, entries)
    factors = entries[0].factors
    if as_json:
        shards = {entry.shard: {"members": entry.members} for entry in entries}
        shared.print_json(msgspec.to_builtins(item) | {"factors": factors, "shards": shards})
        return
    out = shared.console()
    for name in ("key", "kind", "model", "platform"):
        out.print(f"{name:10}{plain(getattr(item, name))}", soft_wrap=True)
    out.print(f"created   {date(item.created)}")
    out.print(f"last use  {'in use' if item.in_use else date(item.used)}")
    out.print(f"size      {size(item.size)}")
    sections = {"factors, which the key was made of": factors}
    for entry in entries:
        members = {name: f"{blob.digest[:DIGITS]}  {size(blob.size)}" for name, blob in entry.members.items()}
        sections[f"members of {entry.shard}"] = members
    for title, values in sections.items():
        out.print(f"\n{plain(title)}", style="bold")
        columns = Column(overflow="fold"), Column(overflow="fold")
        pairs = Table(*columns, show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in values.items():
            pairs.add_row(plain(name), plain(value))
        out.print(pairs)


def verify(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Read everything and check its digests; exit status 1 when something is damaged."""
    opened = shared.open_store(store)
    problems = [(problem, _affected(opened, problem)) for problem in opened.verify()]
    if as_json:
        damaged = [{"path": str(found.path), "problem": str(found), "keys": keys} for found, keys in problems]
        shared.print_json({"store": str(opened.root), "damaged": damaged})
    elif not problems:
        entries = count(len(shared.keys(opened)), "entry", "entries")
        typer.echo(f"{entries} and {size(opened.size())} in {opened.root}: all digests match")
    else:
        for problem, _ in problems:
            typer.echo(str(problem))
        if affected := sorted({key for _, keys in problems for key in keys}):
            typer.echo(
                "Nothing damaged is ever run: vLLM compiles it again at the next start and replaces it. "
                "To remove the entries it belongs to:"
            )
            for key in affected:
                typer.echo(f"  vllm-compile-ext cache rm {key[:DIGITS]}")
        else:
            typer.echo(
                "No entry needs what is damaged. Remove it: vllm-compile-ext cache gc, an hour after it was written."
            )
    if problems:
        raise typer.Exit(1)


def _affected(store: Store, problem: DamagedError) -> list[str]:
    """The keys of the entries that need the damaged file."""
    if problem.path.suffix == ".json":
        return [problem.path.parent.name]
    digest = problem.path.name
    return sorted({e.key for e in store.manifests() if any(b.digest == digest for b in e.members.values())})


def gc(
    max_gb: Annotated[
        float | None, typer.Option(min=0, help="Keep at most this many GiB instead of VLLM_COMPILE_STORE_MAX_GB.")
    ] = None,
    max_age: Annotated[float | None, typer.Option(min=0, metavar="DAYS", help="Keep what was used since.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove the least recently used entries, what no entry needs, and then kernels; nothing that is in use.

    Kernels may have what the entries leave of the limit.  Those used since yesterday stay.
    """
    opened = shared.open_store(store)
    limit = opened.max_bytes if max_gb is None else int(max_gb * 2**30)
    seconds = None if max_age is None else max_age * 86400
    removed = evict.trim(opened, limit, seconds) if opened.root.exists() else Removed([], [], 0)
    left = None if limit is None else max(0, limit - opened.size())
    _print_removed(removed, kernels.trim(opened.jit, left, seconds), as_json=as_json)


def rm(key: KeyArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Remove an entry and what only it needs; exit status 1 when it is in use."""
    opened = shared.open_store(store)
    removed = evict.remove(opened, shared.key(opened, key))
    _print_removed(removed, [], as_json=as_json)
    if removed.in_use:
        raise typer.Exit(1)


def _print_removed(removed: Removed, gone: list[Kernel], *, as_json: bool) -> None:
    freed = removed.freed + sum(kernel.size for kernel in gone)
    if as_json:
        shared.print_json(msgspec.to_builtins(removed) | {"freed": freed, "kernels": len(gone)})
        return
    for name in removed.manifests:
        typer.echo(f"removed {name}")
    for name in removed.in_use:
        typer.echo(f"kept {name}: it is in use")
    if gone:
        typer.echo(f"removed {count(len(gone), 'kernel')}")
    typer.echo(f"{size(freed)} freed")


def pack(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="Entries; all without one.")] = None,
    signing_key: Annotated[
        Path | None, typer.Option("--sign", metavar="KEYFILE", help="Sign with this Ed25519 private key.")
    ] = None,
    jit: Annotated[bool, typer.Option("--jit/--no-jit", help="Whether the kernel caches come along.")] = True,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write entries to one file that `unpack` puts into another store.

    A key pair: openssl genpkey -algorithm ed25519 -out signing.pem;
    openssl pkey -in signing.pem -pubout -out signing.pub.pem
    """
    opened = shared.open_store(store)
    wanted = {shared.key(opened, prefix) for prefix in keys} if keys else None
    private = None if signing_key is None else bundle.private_key(signing_key)
    _print_bundle("packed", out, bundle.pack(opened, out, wanted, key=private, jit=jit), as_json=as_json)


def unpack(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What pack wrote.")],
    trust: Annotated[
        list[Path] | None, typer.Option(metavar="PUBKEY", help="Accept what this Ed25519 public key signed.")
    ] = None,
    allow_unsigned: Annotated[
        bool, typer.Option("--allow-unsigned", help="Accept what no trusted key signed: its code will be run.")
    ] = False,
    any_platform: Annotated[
        bool, typer.Option("--any-platform", help="Accept code for other machines than this one.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Also replace what the store has a newer one of.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put what `pack` wrote into the store, after its signature and all digests were checked."""
    opened = shared.open_store(store, make=True)
    wanted = None if any_platform else platforms.possible()
    keys = [bundle.public_key(path) for path in trust or ()]
    made = bundle.unpack(opened, file, keys, allow_unsigned=allow_unsigned, platforms=wanted, replace=replace)
    _print_bundle("unpacked", file, made, as_json=as_json)


def _print_bundle(verb: str, file: Path, made: Bundle, *, as_json: bool) -> None:
    length = file.stat().st_size
    if as_json:
        shared.print_json({"file": str(file), "file_size": length} | msgspec.to_builtins(made))
        return
    entries, blobs = count(len(made.keys), "entry", "entries"), count(made.blobs, "blob")
    files = count(made.jit_files, "kernel file")
    typer.echo(f"{verb} {entries}, {blobs}, {files} ({size(made.size)}) for {plain(made.platform)}")
    for name in made.kept:
        typer.echo(f"kept {name}: the store's was made later (--replace takes the bundle's)")
    typer.echo(f"{file}: {size(length)}, {f'signed by key {made.signed_by}' if made.signed_by else 'not signed'}")
