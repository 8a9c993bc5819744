"""Rollout: change the model of running servers, and go back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aisle.commands import Json, Precision, Repository, report
from aisle.commands.command import Stage, refuse
from aisle.console import say

app = Stage()


@app.command()
def deploy(
    ctx: typer.Context,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A folder that `aisle train` made; it is built first.",
        ),
    ] = None,
    repository: Repository = Path("model_repository"),
    version: Annotated[
        int | None, typer.Option(min=1, help="A version that is already built.", show_default="the newest")
    ] = None,
    shadow: Annotated[
        int, typer.Option(min=0, help="Seconds to compare it with the live version on copies of requests.")
    ] = 0,
    agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Least share of the shadow's texts on which both versions agree.")
    ] = 0.9,
    canary: Annotated[float, typer.Option(min=0, max=1, help="Share of the requests that it answers first.")] = 0.0,
    canary_seconds: Annotated[int, typer.Option(min=1, help="Seconds of the canary.")] = 60,
    trial_requests: Annotated[
        int, typer.Option(min=1, help="Least number of live requests that a shadow or canary must see to count.")
    ] = 20,
    precision: Precision = None,
    as_json: Json = False,
) -> None:
    """Switch running servers to a new model without losing a request. A model that does not work is refused."""
    if checkpoint is None:
        refuse(ctx, "precision", because="needs CHECKPOINT")
    else:
        refuse(ctx, "version", because="cannot be given with CHECKPOINT, which makes a new version")
    if not shadow:
        refuse(ctx, "agreement", because="needs --shadow SECONDS")
    if not canary:
        refuse(ctx, "canary_seconds", because="needs --canary SHARE")
    if not shadow and not canary:
        refuse(ctx, "trial_requests", because="needs --shadow SECONDS or --canary SHARE")
    from aisle.deploy.server.rollout import Trial, check_unlocked
    from aisle.deploy.server.rollout import deploy as run

    if checkpoint is not None:
        check_unlocked(repository)
        from aisle.build.build import build

        version = int(build(checkpoint, repository, precision=precision)["version"])
    trial = Trial(
        shadow_seconds=shadow,
        agreement=agreement,
        canary=canary,
        canary_seconds=canary_seconds,
        requests=trial_requests,
    )
    report(run(repository, version, trial), as_json, _show)


@app.command()
def rollback(repository: Repository = Path("model_repository"), as_json: Json = False) -> None:
    """Switch back to the model that was served before the last `aisle deploy`."""
    from aisle.deploy.server.rollout import rollback as run

    report(run(repository), as_json, _show)


def _show(result: dict[str, Any]) -> None:
    if note := result["gate"]["note"]:
        say(f"version {result['version']}: {note}")
    if not result.get("changed", True):
        say(f"version {result['version']} is already live")
        return
    where = f"on {result['servers']} servers" if result["servers"] else "from the next start on; no server is running"
    say(f"version {result['version']} is live {where}; version {result['previous']} is kept for `aisle rollback`")
    for name in ("shadow", "canary"):
        if name in result:
            figures = {key: value for key, value in result[name].items() if key != "changes" and value is not None}
            say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
