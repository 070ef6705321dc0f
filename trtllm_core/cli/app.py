"""The commands as one application, and what becomes of errors."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trtllm_core.cli.bench import bench
from trtllm_core.cli.bench_plugin import bench_plugin
from trtllm_core.cli.build import build
from trtllm_core.cli.conform import conform
from trtllm_core.cli.console import print_error
from trtllm_core.cli.doctor import doctor
from trtllm_core.cli.explain import explain
from trtllm_core.cli.inspect import inspect
from trtllm_core.cli.new_plugin import new_plugin
from trtllm_core.cli.plan import plan
from trtllm_core.cli.plugins import plugins
from trtllm_core.cli.run import run
from trtllm_core.errors import TrtllmCoreError
from trtllm_core.version import __version__

WRONG_PATHS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
"""What the operating system says about a path that the user gave."""


class Commands(TyperGroup):
    """The group of commands. Errors that users can mend are one sentence and status 2, all others a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except TrtllmCoreError as error:
            print_error(str(error))
        except WRONG_PATHS as error:
            print_error(f"{error.filename}: {error.strerror}")
        raise typer.Exit(2)


app = typer.Typer(
    cls=Commands,
    name="trtllm-core",
    help="LLM inference whose every part is a plugin.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """LLM inference whose every part is a plugin."""


for command in (build, run, bench, plugins, explain, plan, inspect, doctor, conform, new_plugin, bench_plugin):
    app.command()(command)
