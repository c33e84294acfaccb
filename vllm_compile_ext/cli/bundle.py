"""``vllm-compile-ext cache pack | unpack``: entries of the store as one file, for other machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_compile_ext import platforms
from vllm_compile_ext.artifacts import bundle, sign
from vllm_compile_ext.artifacts.bundle import Bundle
from vllm_compile_ext.cli import _store
from vllm_compile_ext.cli._store import JsonOption, StoreOption


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
            opened, out, wanted, key=None if signing_key is None else sign.private_key(signing_key), jit=jit
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
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put what `pack` wrote into the store, after its signature and all digests were checked."""
    with _store.errors():
        opened = _store.open_store(store, make=True)
        wanted = None if any_platform else platforms.possible()
        keys = [sign.public_key(path) for path in trust or ()]
        made = bundle.unpack(opened, file, keys, allow_unsigned=allow_unsigned, platforms=wanted)
        _report("unpacked", file, made, as_json=as_json)


def _report(what: str, file: Path, made: Bundle, *, as_json: bool) -> None:
    index = made.index
    keys = sorted({entry.key for entry in index.manifests})
    if as_json:
        data = {"file": str(file), "file_size": file.stat().st_size, "size": index.size, "platform": index.platform}
        data |= {"keys": keys, "blobs": len(index.blobs), "jit_files": len(index.jit), "signed_by": made.signed_by}
        _store.print_json(data)
        return
    parts = (
        _store.count(len(keys), "entry", "entries"),
        _store.count(len(index.blobs), "blob"),
        _store.count(len(index.jit), "kernel file"),
    )
    signed = f"signed by key {made.signed_by}" if made.signed_by else "not signed"
    typer.echo(f"{what} {', '.join(parts)} ({_store.size(index.size)}) for {index.platform}")
    typer.echo(f"{file}: {_store.size(file.stat().st_size)}, {signed}")
