"""The `aisle` command: all commands in groups."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import aisle
from aisle.commands import (
    adapt,
    categories,
    compress,
    data,
    engine,
    experiments,
    learn,
    load,
    measure,
    rollout,
    serving,
    stream,
    watching,
)
from aisle.commands.command import simplify_help

STAGES = (
    data,
    learn,
    experiments,
    compress,
    measure,
    engine,
    serving,
    stream,
    rollout,
    load,
    adapt,
    categories,
    watching,
)
# The groups of commands in the help. The first group has the commands that everyone needs, in order of use.
PANELS = {
    "From a table to categories": ("demo", "clean", "train", "evaluate", "build", "serve", "classify", "deploy"),
    "Models in production": (
        "desk",
        "desk-user",
        "rest",
        "stream",
        "rollback",
        "lineage",
        "drift",
        "watch",
        "demand",
        "review",
        "retrain",
        "decide",
        "category",
    ),
    "Search by meaning": ("embed", "index", "similar", "duplicates"),
    "Better and smaller models": ("pretrain", "search", "distil", "prune"),
    "Explain and compare": ("explain", "compare", "frontier", "ablate", "stages"),
    "Speed and load": ("bench", "loadtest", "overload"),
    "Sample data": ("sample",),
}

ALIASES = {"study": "stages"}  # earlier names, which the help does not list


class Commands(TyperGroup):
    """The commands in the order of `PANELS`. Commands that are not named there come last."""

    def list_commands(self, ctx: Any) -> list[str]:
        named = [name for names in PANELS.values() for name in names if name in self.commands]
        return named + [name for name in self.commands if name not in named]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        cmd_name = ALIASES.get(cmd_name, cmd_name)
        command: Any = super().get_command(ctx, cmd_name)
        for panel, names in PANELS.items():
            if cmd_name in names:
                command.rich_help_panel = panel
        return command

    def get_params(self, ctx: Any) -> list[Any]:
        return simplify_help(super().get_params(ctx))


app = typer.Typer(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for stage in STAGES:
    app.add_typer(stage.app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"aisle {aisle.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Product text in, category out."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
