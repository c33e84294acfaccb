"""``vllm-compile-ext cache pack | unpack``: entries of the store as one file, for other machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from vllm_compile_ext import platforms
from vllm_compile_ext.cli import _store
from vllm_compile_ext.cli._store import JsonOption, StoreOption
from vllm_compile_ext.store import bundle
from vllm_compile_ext.store.bundle import Bundle


def pack(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY]...", help="Entries; all without one.", show_default=False)
    ] = None,
    signing_key: Annotated[
        Path | None,
        typer.Option("--sign", metavar="KEYFILE", help="Sign with this Ed25519 private key.", show_default=False),
    ] = None,
    jit: Annotated[bool, typer.Option("--jit/--no-jit", help="Whether the kernel caches come along.")] = True,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write entries to one file that `unpack` puts into another store.

    A key pair: openssl genpkey -algorithm ed25519 -out signing.pem;
    openssl pkey -in signing.pem -pubout -out signing.pub.pem
    """
    with _store.errors():
        opened = _store.open_store(store)
        wanted = {_store.key(opened, prefix) for prefix in keys} if keys else None
        made = bundle.pack(
            opened, out, wanted, key=None if signing_key is None else bundle.private_key(signing_key), jit=jit
        )
        _report("packed", out, made, as_json=as_json)


def unpack(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What pack wrote.")],
    trust: Annotated[
        list[Path] | None,
        typer.Option(metavar="PUBKEY", help="Accept what this Ed25519 public key signed.", show_default=False),
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
    with _store.errors():
        opened = _store.open_store(store, make=True)
        wanted = None if any_platform else platforms.possible()
        keys = [bundle.public_key(path) for path in trust or ()]
        made = bundle.unpack(opened, file, keys, allow_unsigned=allow_unsigned, platforms=wanted, replace=replace)
        _report("unpacked", file, made, as_json=as_json)


def _report(what: str, file: Path, made: Bundle, *, as_json: bool) -> None:
    if as_json:
        _store.print_json({"file": str(file), "file_size": file.stat().st_size} | msgspec.to_builtins(made))
        return
    parts = (
        _store.count(len(made.keys), "entry", "entries"),
        _store.count(made.blobs, "blob"),
        _store.count(made.jit_files, "kernel file"),
    )
    signed = f"signed by key {made.signed_by}" if made.signed_by else "not signed"
    typer.echo(f"{what} {', '.join(parts)} ({_store.size(made.size)}) for {_store.plain(made.platform)}")
    for name in made.kept:
        typer.echo(f"kept {name}: the store's was made later (--replace takes the bundle's)")
    typer.echo(f"{file}: {_store.size(file.stat().st_size)}, {signed}")
