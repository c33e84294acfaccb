"""``vllm-compile-ext explain``: what options turn on and who says so; and why a start compiled what a store might have
had.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Column, Table
from typer.core import TyperGroup

from vllm_compile_ext.cli import shared
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
Setting = dict[str, Any]  # a row of `resolve.py`
Resolved = tuple[list[Setting], dict[str, str | None]]  # and why what the plugin does is not done, or None
LEVELS = ("-O0", "-O1", "-O2", "-O3")
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
    levels: Annotated[bool, typer.Option("--levels", help="Show what -O0 to -O3 make different.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show what is as it is by default, too.")] = False,
    as_json: JsonOption = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown, for a page.")] = False,
    verbose: VerboseOption = False,
) -> None:
    if not context.args:
        raise typer.BadParameter("name a model: vllm-compile-ext explain MODEL [options of vllm serve]")
    if levels and diff is not None:
        raise typer.BadParameter("--levels and --diff are two tables: leave one out")
    if levels:
        data, table = _levels(resolve(context.args, [[level] for level in LEVELS], verbose))
    elif diff is not None:
        data, table = _difference(diff, resolve(context.args, [[], shlex.split(diff)], verbose))
    else:
        ((rows, _),) = resolve(context.args, [[]], verbose)
        data, table = _settings([row for row in rows if everything or row["source"] != "default"])
    if as_json:
        shared.print_json(data)
        return
    console = shared.console()
    if as_markdown:
        table.box, table.show_lines, console.width = box.MARKDOWN, False, 10_000  # a row has to be one line
    console.print(table)
    console.print("code: whether other values of a setting need code of their own, which is compiled once more")


# Each of these makes what --json prints, and the table.


def _settings(rows: Sequence[Setting]) -> tuple[Any, Table]:
    table = Table("setting", "value", "set by", "where", "asked for", "code", "at a start", show_lines=True)
    for row in rows:
        cells = [row["name"], _short(row["value"]), row["source"], row["where"], _short(row["asked"] or "")]
        table.add_row(*map(plain, cells), _code(row), effect(row["name"]))
    return [row | {"effect": effect(row["name"])} for row in rows], table


def _difference(diff: str, resolved: Sequence[Resolved]) -> tuple[Any, Table]:
    changed = _differing(resolved)
    table = Table("setting", "value", "set by", f"with {diff}", "set by", "code", show_lines=True)
    for row, other in changed:
        cells = [text for each in (row, other) for text in (_short(each["value"]), each["source"])]
        table.add_row(row["name"], *map(plain, cells), _code(row, other))
    return [{"name": row["name"], "these": row, "those": other} for row, other in changed], table


def _levels(resolved: Sequence[Resolved]) -> tuple[Any, Table]:
    changed = _differing(resolved)
    table = Table("setting", *LEVELS, "code", show_lines=True)
    for rows in changed:
        table.add_row(rows[0]["name"], *(plain(_short(row["value"])) for row in rows), _code(*rows))
    reasons = {name: [ours[name] for _, ours in resolved] for name in resolved[0][1]}
    for name, each in reasons.items():
        table.add_row(name, *("yes" if why is None else plain(f"no: {why}") for why in each))

    def by_level(values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(LEVELS, values, strict=True))

    settings = [{"name": rows[0]["name"], "levels": by_level(rows)} for rows in changed]
    ours = [{"name": name, "why_not": by_level(each)} for name, each in reasons.items()]
    return {"settings": settings, "ours": ours}, table


def _differing(resolved: Sequence[Resolved]) -> list[tuple[Setting, ...]]:
    """The rows of each setting whose value is not the same in all."""
    others = [{row["name"]: row for row in rows} for rows, _ in resolved[1:]]
    found = [(row, *(rows[row["name"]] for rows in others)) for row in resolved[0][0]]
    return [rows for rows in found if len({row["value"] for row in rows}) > 1]


def _code(*rows: Setting) -> str:
    return "its own" if any(row["in_key"] for row in rows) else "the same"


def effect(name: str) -> str:
    return next((text for beginning, text in EFFECTS if name.startswith(beginning)), "")


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:57]}..."


def resolve(arguments: Sequence[str], added: Sequence[Sequence[str]], verbose: bool) -> list[Resolved]:
    """What `resolve.py` says of the options of `vllm serve`, with each of `added` behind them.

    Raises `ProgramError`; a bad option ends with 2.
    """
    answers = shared.ask("vllm_compile_ext.cli.resolve", [json.dumps(added), *arguments], "explain", verbose)
    return [(each["settings"], each["ours"]) for each in answers]


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
