"""What the commands about the store share: its options, finding it, words for people, and errors in one line."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich import filesize
from rich.console import Console

from vllm_compile_ext.artifacts.bundle import BundleError
from vllm_compile_ext.artifacts.manifest import ManifestError
from vllm_compile_ext.artifacts.sign import SignError
from vllm_compile_ext.artifacts.store import DamagedError, Store, UnsafeStoreError

DIGITS = 12  # of a key, in tables

StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="The store; without it VLLM_COMPILE_STORE, or compile_store in vLLM's cache root.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class UserError(Exception):
    """What was asked for cannot be done; the message says why."""


def folder(given: Path | None) -> Path:
    """Where the store is."""
    if given is not None:
        return given
    if set_to := os.environ.get("VLLM_COMPILE_STORE"):
        return Path(set_to)
    # As vllm/envs.py has it (0.32.0).
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("VLLM_CACHE_ROOT") or Path(caches, "vllm")) / "compile_store"


def open_store(given: Path | None, *, make: bool = False) -> Store:
    """The store, with nothing in it when there is none; `make` makes one then.  Raises `UnsafeStoreError`."""
    root = folder(given).expanduser().absolute()
    return Store.open(root) if make or root.exists() else Store(root, None, writable=False)


def local_platform(store: Store) -> str | None:
    """What manifests call the platform of this machine: so far, what most entries of its store are for."""
    found = Counter(entry.platform for entry in store.manifests()).most_common(1)
    return found[0][0] if found else None


def files(store: Store) -> list[Path]:
    """The manifests' files, whether they can be read or not."""
    return list(store.layout.manifests.glob("*/*.json"))


def keys(store: Store) -> list[str]:
    """The keys of all entries."""
    return sorted({path.parent.name for path in files(store)})


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
    except (UserError, BundleError, DamagedError, ManifestError, SignError, UnsafeStoreError, OSError) as error:
        typer.echo(f"vllm-compile-ext: {error}", err=True)
        raise typer.Exit(1) from error


def console() -> Console:
    return Console(highlight=False, markup=False, emoji=False)


def print_json(value: Any) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def plain(text: str) -> str:
    """`text` without what a terminal would act on: a bundle's author chose it."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def size(count: int) -> str:
    """Bytes, such as "5.1 MB"; a MB is 1000 kB."""
    return filesize.decimal(count)


def count(number: int, one: str, many: str = "") -> str:
    """Such as "1 piece" or "81 pieces"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def date(moment: float) -> str:
    """A unix time in local time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
    except (OverflowError, ValueError, OSError):
        return "?"


def ago(moment: float) -> str:
    """How long ago a unix time was, such as "3 h"."""
    minutes = int(max(0.0, time.time() - moment) // 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // 1440} d"
