"""The command ``vllm-compile-ext``: one module for each subcommand, or for a few that belong together."""

from __future__ import annotations

import typer

from vllm_compile_ext.cli import bench, cache, doctor, env, explain, report, warm

app = typer.Typer(help="vllm-compile-ext: vLLM's compilation, built around start-up time.", no_args_is_help=True)
app.command("env")(env.command)
app.command("doctor")(doctor.command)

_cache = typer.Typer(help="The store of compiled code: list, check, clean, carry to other machines.")
_cache.command("ls")(cache.ls)
_cache.command("show")(cache.show)
_cache.command("verify")(cache.verify)
_cache.command("gc")(cache.gc)
_cache.command("rm")(cache.rm)
_cache.command("pack")(cache.pack)
_cache.command("unpack")(cache.unpack)
app.add_typer(_cache, name="cache", no_args_is_help=True)

_explain = typer.Typer(help="Why something happened.")
_explain.callback()(lambda: None)
_explain.command("miss")(explain.miss)
app.add_typer(_explain, name="explain", no_args_is_help=True)

app.command("report")(report.command)
for name, module in (("warm", warm), ("bench", bench)):
    app.command(
        name,
        help=module.HELP,
        options_metavar="MODEL [OPTIONS OF vllm serve]",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(module.command)
