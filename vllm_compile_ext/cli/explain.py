"""``vllm-compile-ext explain``: what options turn on and who says so; and why a start compiled what a store might have
had.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from typer.core import TyperGroup

from vllm_compile_ext.cli import shared
from vllm_compile_ext.cli.program import Program, ProgramError, interruptible
from vllm_compile_ext.cli.progress import Progress
from vllm_compile_ext.cli.shared import JsonOption, StoreOption, VerboseOption
from vllm_compile_ext.harmless import plain
from vllm_compile_ext.key import misses
from vllm_compile_ext.report.formats import date

HELP = "\n\n".join(
    (
        "What the options of `vllm serve` turn on of compilation, graphs, passes and kernels: each value, who set it "
        "(user, -O level, platform, model, vLLM's rules, a plugin) and where, what it means for a start, and whether "
        "other values need other code. Nothing is loaded or started.",
        "`explain miss` says why the last start compiled.",
    )
)
# What a setting means for a start; of several that fit the first.
EFFECTS = (
    ("optimization_level", "which of these are on, where nobody says otherwise"),
    ("enforce_eager", "no compiling and no graphs: the shortest first start, slower requests"),
    ("mode", "VLLM_COMPILE compiles in pieces, keeps and loads them; NONE compiles nothing"),
    ("backend", "who compiles; only Inductor's code is kept"),
    ("custom_ops", "which operators run vLLM's kernels; the others are compiled"),
    ("splitting_ops", "where the model is cut: equal pieces are compiled once"),
    ("compile_sizes", "each is compiled once more"),
    ("compile_ranges_endpoints", "each range is compiled"),
    ("cudagraph_mode", "graphs are captured on demand; by stock while starting; NONE: never"),
    ("cudagraph_capture_sizes", "batch sizes that may have a graph; by stock all are captured while starting"),
    ("use_inductor_graph_partition", "if on, traced as stock does it"),
    ("pass_config.", "a pass while compiling; nothing where code is loaded"),
    ("kernel_config.enable_flashinfer_autotune", "kernels are measured while starting"),
    ("kernel_config.enable_jit_warmup", "kernels are compiled while starting"),
)


class Explain(TyperGroup):
    """Takes the options of `vllm serve` where the first word is none of its commands."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["config", *args]
        return super().parse_args(context, args)


def config(
    context: typer.Context,
    diff: Annotated[
        str | None, typer.Option(metavar="OPTIONS", help="Show what is another with these options added: --diff=-O0.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show what is as it is by default, too.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    if not context.args:
        raise typer.BadParameter("name a model: vllm-compile-ext explain MODEL [options of vllm serve]")
    rows = resolve(context.args, verbose)
    if diff is None:
        shown = [row | {"effect": effect(row["name"])} for row in rows if everything or row["source"] != "default"]
        if as_json:
            shared.print_json(shown)
            return
        table = Table("setting", "value", "set by", "where", "asked for", "code", "at a start", show_lines=True)
        for row in shown:
            cells = [row["name"], _short(row["value"]), row["source"], row["where"], _short(row["asked"] or "")]
            table.add_row(*map(plain, cells), "its own" if row["in_key"] else "the same", row["effect"])
    else:
        others = {row["name"]: row for row in resolve([*context.args, *shlex.split(diff)], verbose)}
        changed = [(row, others[row["name"]]) for row in rows if row["value"] != others[row["name"]]["value"]]
        if as_json:
            shared.print_json([{"name": row["name"], "these": row, "those": other} for row, other in changed])
            return
        table = Table("setting", "value", "set by", f"with {diff}", "set by", "code", show_lines=True)
        for row, other in changed:
            cells = [text for each in (row, other) for text in (_short(each["value"]), each["source"])]
            table.add_row(row["name"], *map(plain, cells), "its own" if row["in_key"] else "the same")
    console = shared.console()
    console.print(table)
    console.print("code: whether other values of a setting need code of their own, which is compiled once more")


def effect(name: str) -> str:
    return next((text for beginning, text in EFFECTS if name.startswith(beginning)), "")


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:57]}..."


def resolve(arguments: Sequence[str], verbose: bool) -> list[dict[str, Any]]:
    """The rows of `resolve.py` for the options of `vllm serve`.  Raises `ProgramError`; a bad option ends with 2."""
    progress = Progress(Console(stderr=True, highlight=False), verbose=verbose)
    with tempfile.TemporaryDirectory(prefix="vllm-compile-ext-explain-") as folder, interruptible(), progress:
        to = Path(folder, "rows.json")
        command = [sys.executable, "-m", "vllm_compile_ext.cli.resolve", str(to), *arguments]
        env = dict(os.environ) | {"VLLM_COMPILE_STARTS": "0"}
        progress.begin("explain")
        with Program(command, env, listen=progress.listen) as program:
            status = program.wait()
        lines = [line.text for line in program.lines]
        if status == 2:
            typer.echo("\n".join(lines), err=True)
            raise typer.Exit(2)
        if status != 0:
            raise ProgramError(f"vLLM does not take these options (exit status {status})", [] if verbose else lines)
        rows: list[dict[str, Any]] = json.loads(to.read_text())
    return rows


_WIDTH = 200  # characters of a value that are shown, from a little before the difference; --json has all


def miss(
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="The key that was missed; without it the last.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what made the last start miss the store: each factor that differs from the closest entry."""
    opened = shared.open_store(store)
    found = next((miss for miss in misses.read(opened.tree) if miss.key.startswith(key or "")), None)
    if as_json:
        shared.print_json({"store": str(opened.root), "miss": found})
        return
    if found is None:
        asked = f" of a key that begins with {key!r}" if key else ""
        typer.echo(f"no miss{asked} is recorded in {opened.root}")
        return
    out = shared.console()
    out.print(plain(misses.summary(found.changes)), style="bold", soft_wrap=True)
    out.print(f"{date(found.time)}, {plain(found.model)}, {plain(found.shard)}", soft_wrap=True)
    out.print(f"wanted   {found.key}", soft_wrap=True)
    if found.closest is not None:
        out.print(f"closest  {found.closest}", soft_wrap=True)
    if found.changes:
        columns = [Column(name, overflow="fold", ratio=r) for name, r in (("factor", 1), ("stored", 2), ("now", 2))]
        table = Table(*columns, show_lines=True, expand=True)
        for name, old, new in found.changes:
            stored, now = misses.shorten(old or "", new or "", _WIDTH)
            cells = "unset" if old is None else stored, "unset" if new is None else now
            table.add_row(plain(name), *map(plain, cells))
        out.print()
        out.print(table)
