"""``vllm-compile-ext ops``: which of vLLM's custom ops run what, by which rule, and what would be faster."""

from __future__ import annotations

import os
import statistics
from typing import Annotated, Any

import msgspec
import psutil
import typer
from rich.table import Table

from vllm_compile_ext import settings
from vllm_compile_ext.cli import shared
from vllm_compile_ext.cli.shared import JsonOption, VerboseOption
from vllm_compile_ext.harmless import plain
from vllm_compile_ext.ops import auto
from vllm_compile_ext.store.store import Store

HELP = "\n\n".join(
    (
        "vLLM's custom ops: which implementations there are, which one runs with these options, and the rule that says "
        "so. With a MODEL and the options of `vllm serve` those that it calls, and their shapes; without one all, with "
        "vLLM's defaults.",
        "--measure times the kernel, the native form and the compiled native form of each, and keeps the outcome for "
        "VLLM_COMPILE_CUSTOM_OPS=auto. It takes minutes, and a machine without other work.",
    )
)
RUNS = {"kernel": "vLLM's kernel", "compiled": "Inductor's code", "native": "PyTorch, as it is"}

BUSY = 20  # percent of the processors, from which on a measurement is not kept


def command(
    context: typer.Context,
    measure: Annotated[bool, typer.Option("--measure", help="Time them on this machine, too.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show those that the model does not call, too.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    if measure and not context.args:
        raise typer.BadParameter("name a model: vllm-compile-ext ops MODEL --measure")
    what = "measure" if measure else "all" if everything or not context.args else "model"
    busy = _busy() if measure else 0.0
    (found,) = shared.ask("vllm_compile_ext.cli.measure_ops", [what, *context.args], "ops", verbose)
    not_kept = _why_not_kept(found, busy)
    if found["measured"] is not None and not_kept is None:
        auto.keep(Store.open(settings.store()).root, msgspec.convert(found["measured"], auto.Measured))
    if as_json:
        shared.print_json(found)
        return
    out = shared.console()
    out.print(_list(found["ops"], found["calls"]))
    out.print(f"custom_ops: {' '.join(found['custom_ops'])}", soft_wrap=True)
    if found["problem"] is not None:
        out.print(f"not all that the model calls is known: {plain(found['problem'])}", soft_wrap=True)
    if found["measured"] is None:
        return
    out.print(_figures(found["calls"]))
    choice = ", ".join(f'"{entry}"' for entry in found["measured"]["choice"])
    text = f"--compilation-config '{{\"custom_ops\": [{choice}]}}'" if choice else "custom_ops as they are"
    out.print(f"recommended: {text}", soft_wrap=True)
    out.print("kept for VLLM_COMPILE_CUSTOM_OPS=auto" if not_kept is None else f"not kept: {not_kept}", soft_wrap=True)


def _busy() -> float:
    """Percent of the processors that this process may use, that others use now."""
    taken = psutil.cpu_percent(1, percpu=True)
    return statistics.fmean(taken[each] for each in os.sched_getaffinity(0))


def _why_not_kept(found: dict[str, Any], busy: float) -> str | None:
    if found["asked"]:
        return "custom_ops are given, and others were not measured"
    if busy > BUSY:
        return f"other work took {busy:.0f} % of the processors, so that these times say little"
    return found["problem"] and "not all that the model calls is known"


def _list(ops: list[dict[str, Any]], calls: list[dict[str, Any]]) -> Table:
    table = Table("op", "runs", "by", "there are", "calls a step, with shapes (n: tokens)", show_lines=True)
    for op in ops:
        shapes = [f"{call['count']} x {call['shapes']}" for call in calls if call["name"] == op["name"]]
        runs = RUNS[op["runs"]] + (f" ({op['kernel'].removeprefix('forward_')})" if op["runs"] == "kernel" else "")
        cells = op["name"], runs, op["rule"], ", ".join(op["implementations"])
        table.add_row(*map(plain, cells), "\n".join(map(plain, shapes)))
    return table


def _figures(calls: list[dict[str, Any]]) -> Table:
    table = Table(title="microseconds a call; error: the largest difference, as a share of the largest result")
    for name in ("op", "shapes", "tokens", "error", "kernel", "native", "compiled"):
        table.add_column(name, justify="left" if name in ("op", "shapes") else "right")
    for call in calls:
        if "problem" in call:
            table.add_row(plain(call["name"]), plain(f"{call['shapes']}: {call['problem']}"))
        for number, row in enumerate(call.get("figures", ())):
            times = [f"{row[name] * 1e6:.1f}" for name in ("kernel", "native", "compiled")]
            names = [plain(call[name]) if number == 0 else "" for name in ("name", "shapes")]
            table.add_row(*names, str(row["tokens"]), f"{row['error']:.4f}", *times)
        table.add_section()
    return table
