"""The command ``vllm-compile-ext``: one module for each subcommand."""

from __future__ import annotations

import typer

from vllm_compile_ext.cli import doctor, env, warm

app = typer.Typer(help="vllm-compile-ext: vLLM's compilation, built around start-up time.", no_args_is_help=True)
app.command("env")(env.command)
app.command("doctor")(doctor.command)
app.command(
    "warm",
    help=warm.HELP,
    options_metavar="MODEL [OPTIONS OF vllm serve]",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(warm.command)
