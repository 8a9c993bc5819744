"""Changing the model of running servers, and going back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aisle.commands import Json, Repository, report
from aisle.console import say

app = typer.Typer()


@app.command()
def deploy(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="A folder that `aisle train` made, to be built first as `aisle build` does by default."),
    ] = None,
    repository: Repository = Path("model_repository"),
    version: Annotated[int | None, typer.Option(help="A version that was built before; default: the newest.")] = None,
    shadow: Annotated[int, typer.Option(min=0, help="Seconds to compare it with the live version, unseen.")] = 0,
    agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Least share of live texts on which both must agree.")
    ] = 0.9,
    canary: Annotated[float, typer.Option(min=0, max=1, help="Share of the requests that it answers at first.")] = 0.0,
    canary_seconds: Annotated[int, typer.Option(min=1, help="How long it answers only that share.")] = 60,
    precision: Annotated[
        str | None, typer.Option(help="Of CHECKPOINT's engine: int8 (the default), fp16, bf16, fp32.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Have a new model take over from the one that is served, without losing a request; refuse one that cannot."""
    from aisle.deploy.live import Trial
    from aisle.deploy.live import deploy as run

    if checkpoint is not None:
        from aisle.build.build import build

        version = int(build(checkpoint, repository, precision=precision)["version"])
    trial = Trial(shadow_seconds=shadow, agreement=agreement, canary=canary, canary_seconds=canary_seconds)
    report(run(repository, version, trial), as_json, _show)


@app.command()
def rollback(repository: Repository = Path("model_repository"), as_json: Json = False) -> None:
    """Have the model that was served before the last `aisle deploy` take over again."""
    from aisle.deploy.live import rollback as run

    report(run(repository), as_json, _show)


def _show(result: dict[str, Any]) -> None:
    if not result.get("changed", True):
        say(f"version {result['version']} is live already")
        return
    where = f"on {result['servers']} servers" if result["servers"] else "from the next start on; no server runs now"
    say(f"version {result['version']} answers {where}; version {result['previous']} is kept for `aisle rollback`")
    for name in ("shadow", "canary"):
        if name in result:
            say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in result[name].items() if key != "changes"))
