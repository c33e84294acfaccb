"""The command ``vllm-compile-ext``: one module for each subcommand, or for a few that belong together."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from vllm_compile_ext.cli import bench, cache, doctor, env, explain, ops, patch, report, standby, warm
from vllm_compile_ext.cli.program import ProgramError, excerpt
from vllm_compile_ext.cli.shared import EXPECTED
from vllm_compile_ext.harmless import plain


class _Commands(TyperGroup):
    """Commands that end with one line and exit status 1 where something goes wrong that can be expected.

    Before it comes the end of vLLM's log, where that was not shown.
    """

    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except BrokenPipeError:  # nobody reads on: typer ends quietly
            raise
        except EXPECTED as error:
            if isinstance(error, ProgramError) and error.lines:
                typer.echo("\n".join(["from vllm's log (all of it: --verbose):", *excerpt(error.lines)]), err=True)
            typer.echo(plain(f"vllm-compile-ext: {error}"), err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands, help="vllm-compile-ext: vLLM's compilation, built around start-up time.", no_args_is_help=True
)
app.command("env")(env.command)
app.command("doctor")(doctor.command)
app.command("report")(report.command)
app.command("standby")(standby.command)
for name, module in (("warm", warm), ("bench", bench), ("ops", ops)):
    app.command(
        name,
        help=module.HELP,
        options_metavar="MODEL [OPTIONS OF vllm serve]",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(module.command)

_cache = typer.Typer(help="The store of compiled code: list, check, clean, carry to other machines.")
for command in (cache.ls, cache.show, cache.verify, cache.gc, cache.rm, cache.pack, cache.unpack):
    _cache.command()(command)
app.add_typer(_cache, name="cache", no_args_is_help=True)

_patch = typer.Typer(help="A few lines in vLLM's own files: for people who build vLLM, or let it load no plugins.")
for step in (patch.apply, patch.check, patch.revert):
    _patch.command()(step)
app.add_typer(_patch, name="patch", no_args_is_help=True)

_explain = typer.Typer(cls=explain.Explain, help=explain.HELP)
_explain.callback()(lambda: None)
_explain.command(
    options_metavar="MODEL [OPTIONS OF vllm serve]",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    help=explain.HELP,
)(explain.config)
_explain.command()(explain.miss)
app.add_typer(_explain, name="explain", no_args_is_help=True)
