"""Rollout: change the model of running servers, and go back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from aisle.commands import Json, Precision, Repository, report
from aisle.commands.command import Stage, file_to_write, refuse
from aisle.console import say, show
from aisle.errors import InputError
from aisle.files import write_text

app = Stage()


@app.command()
def lineage(
    version: Annotated[
        int | None, typer.Argument(metavar="VERSION", min=1, help="A version.", show_default="the live one")
    ] = None,
    repository: Repository = Path("model_repository"),
    openlineage: Annotated[
        Path | None,
        typer.Option(callback=file_to_write, help="Also write events of OpenLineage here, a JSON object in each line."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a version was made from: tables, corrections, earlier checkpoints, settings and code."""
    from aisle.build.lineage import events
    from aisle.build.lineage import lineage as run
    from aisle.build.repository import versions
    from aisle.deploy.server.release import Release

    number = version or Release.load(repository).live
    if number not in versions(repository):
        raise InputError(f"{repository} has no version {number}; it has: {', '.join(map(str, versions(repository)))}")
    found = run(repository, number)
    if openlineage:
        lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in events(found)]
        write_text(openlineage, "".join(lines))
    report(found, as_json, _show_lineage)


def _show_lineage(found: dict[str, Any]) -> None:
    built, engine, gate = found["built"], found["engine"], found["gate"]
    when = f" on {built['time']}" if built["time"] else ""
    show(
        f"version {found['version']} ({found['fingerprint']}), {engine['precision']} on {engine['target']}, built{when}"
    )
    show(f"  gate: agreement {gate['agreement']:.2%} on {gate['held_out_texts']} held-out texts")
    checkpoint = found["checkpoint"]
    show(f"  checkpoint {checkpoint['sha256'][:16]}, trained {checkpoint.get('time', 'elsewhere')}")
    for each in found["inputs"]:
        rows = f", {each['rows_kept']} of {each['rows_in']} rows" if "rows_kept" in each else ""
        show(f"    {each['kind']} {each['name']} ({(each['sha256'] or 'not told')[:16]}){rows}")
    for step in checkpoint.get("categories", ()):
        details = {name: value for name, value in step.items() if name != "checkpoint_sha256"}
        show(f"    categories changed: {json.dumps(details, ensure_ascii=False)}")


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
