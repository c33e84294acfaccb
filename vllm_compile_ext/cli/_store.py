"""What the commands about the store share: its options, finding it, words for people, and errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from vllm_compile_ext import settings
from vllm_compile_ext.harmless import plain as plain
from vllm_compile_ext.record.read import ReadError
from vllm_compile_ext.report.formats import ago as ago
from vllm_compile_ext.report.formats import count as count
from vllm_compile_ext.report.formats import date as date
from vllm_compile_ext.report.formats import size as size
from vllm_compile_ext.store.bundle import BundleError
from vllm_compile_ext.store.store import DamagedError, ManifestError, Store, UnsafeStoreError

DIGITS = 12  # of a key, in tables

StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="The store; without it VLLM_COMPILE_STORE, or compile_store in vLLM's cache root.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class UserError(Exception):
    """What was asked for cannot be done; the message says why."""


EXPECTED = (
    *(UserError, settings.EnvError, UnsafeStoreError, BundleError),
    *(ManifestError, DamagedError, ReadError, OSError),
)


def open_store(given: Path | None, *, make: bool = False) -> Store:
    """The store, with nothing in it when there is none; `make` makes one then.

    Raises `UnsafeStoreError`, and `settings.EnvError` when its limit cannot be read.
    """
    root = given.expanduser().absolute() if given is not None else settings.store()
    limit = settings.store_limit()
    return Store.open(root, limit) if make or root.exists() else Store(root, limit, writable=False)


def keys(store: Store) -> list[str]:
    """The keys of all entries."""
    return sorted({names[1] for names in store.files()})


def key(store: Store, prefix: str) -> str:
    """The one key that begins with `prefix`.  Raises `UserError`."""
    found = [key for key in keys(store) if key.startswith(prefix)]
    if not found:
        raise UserError(
            f"no entry of {store.root} has a key that begins with {prefix!r}: see vllm-compile-ext cache ls"
        )
    if len(found) > 1:
        some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise UserError(f"{len(found)} entries have keys that begin with {prefix!r}: give more digits of {some}")
    return found[0]


@contextmanager
def errors() -> Iterator[None]:
    """What goes wrong inside ends the command with one line and exit status 1."""
    try:
        yield
    except EXPECTED as error:
        typer.echo(plain(f"vllm-compile-ext: {error}"), err=True)
        raise typer.Exit(1) from error


def console() -> Console:
    return Console(highlight=False, markup=False, emoji=False)


def print_json(value: Any) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))
