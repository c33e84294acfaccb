"""What the commands share: options, finding the store and one of its entries, errors, printing."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from vllm_compile_ext import settings
from vllm_compile_ext.cli.program import Line, Program, ProgramError, interruptible
from vllm_compile_ext.cli.progress import Progress
from vllm_compile_ext.record.read import ReadError
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
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show vLLM's log, on stderr.")]


class UserError(Exception):
    """What was asked for cannot be done; the message says why."""


# What ends a command with its message in one line.
EXPECTED = (
    *(UserError, ProgramError, settings.EnvError, UnsafeStoreError, BundleError),
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
    none = f"no entry of {store.root} has a key that begins with {prefix!r}: see vllm-compile-ext cache ls"
    return only(found, none, f"entries have keys that begin with {prefix!r}")


def only(found: list[str], none: str, many: str) -> str:
    """The one name that was found.  Raises `UserError`: with the text `none`, or with `many` and some of the names."""
    if not found:
        raise UserError(none)
    if len(found) > 1:
        some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise UserError(f"{len(found)} {many}: give more of {some}")
    return found[0]


STEP = "step: "  # how a line of a program begins that says what it does


def ask(module: str, arguments: Sequence[str], title: str, verbose: bool) -> list[Any]:
    """The answers, lines of JSON, of a program of ours that imports vLLM and reads its options: ``module FILE ...``.

    Raises `ProgramError`.  A bad option ends with status 2, after what vLLM says of it.
    """
    progress = Progress(Console(stderr=True, highlight=False), verbose=verbose)

    def listen(line: Line) -> None:
        progress.listen(line)
        if line.text.startswith(STEP):
            progress.step(line.text.removeprefix(STEP))

    with tempfile.TemporaryDirectory(prefix="vllm-compile-ext-") as folder, interruptible(), progress:
        to = Path(folder, "answers.jsonl")
        progress.begin(title)
        command = [sys.executable, "-m", module, str(to), *arguments]
        with Program(command, os.environ | {"VLLM_COMPILE_STARTS": "0"}, listen=listen) as program:
            status = program.wait()
        lines = [line.text for line in program.lines]
        if status == 2:
            typer.echo("\n".join(lines), err=True)
            raise typer.Exit(2)
        if status < 0:  # a kernel, for example
            raise ProgramError(f"{title} was ended by {signal.Signals(-status).name}", [] if verbose else lines)
        if status != 0:
            raise ProgramError(f"vLLM does not take these options (exit status {status})", [] if verbose else lines)
        return [json.loads(line) for line in to.read_text().splitlines()]


def console() -> Console:
    return Console(highlight=False, markup=False, emoji=False)


def print_json(value: Any) -> None:
    """Print what msgspec can encode, in ASCII: nothing that a terminal would act on."""
    typer.echo(json.dumps(msgspec.to_builtins(value), indent=2))
