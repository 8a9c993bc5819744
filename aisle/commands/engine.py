"""Engines: checkpoint to engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aisle.commands import Json, LabelColumn, Repository, TextColumn, report, show_rows
from aisle.console import say
from aisle.errors import InputError

app = typer.Typer()
CalibrationData = Annotated[
    Path | None,
    typer.Option(help="The training table, to calibrate and check with, where the checkpoint has no sample."),
]


@app.command()
def build(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `aisle train` made.")],
    repository: Repository = Path("model_repository"),
    target: Annotated[
        str | None,
        typer.Option(help="openvino, tensorrt or tensorrt-rtx; default: TensorRT where a GPU has it, else OpenVINO."),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="int8 (the default), fp16, bf16 or fp32.")] = None,
    data: CalibrationData = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a text, a multiple of 64 up to 512; default: as it was trained.")
    ] = None,
    gate: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="AGREEMENT F1_LOSS", help="Accept an engine that is worse than its gate allows."),
    ] = None,
    workspace_mb: Annotated[int, typer.Option(help="GPU memory that TensorRT may try kernels with.")] = 4096,
    version_compatible: Annotated[bool, typer.Option(help="TensorRT: a plan for later versions too.")] = False,
    hardware_compatible: Annotated[bool, typer.Option(help="TensorRT: a plan for other GPUs too.")] = False,
    timing_cache: Annotated[Path | None, typer.Option(help="TensorRT: a file to keep kernel timings in.")] = None,
    as_json: Json = False,
) -> None:
    """Compile a checkpoint into a verified engine, the next version of the model repository."""
    from aisle.build.build import build as run
    from aisle.build.gate import Gate
    from aisle.build.material import Table
    from aisle.build.tensorrt import Options

    if max_tokens is not None and max_tokens not in range(64, 513, 64):
        raise InputError(f"--max-tokens {max_tokens}: give a multiple of 64 from 64 to 512")
    result = run(
        checkpoint,
        repository,
        target,
        precision,
        data=Table(data, text_column, label_column) if data else None,
        max_tokens=max_tokens,
        gate=Gate(*gate) if gate else None,
        options=Options(workspace_mb, version_compatible, hardware_compatible, timing_cache),
    )
    report(result, as_json, lambda r: _show_build(r, checkpoint, repository))


@app.command()
def compare(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `aisle train` made.")],
    html: Annotated[Path, typer.Option("--report", help="The page to write; a .json goes beside it.")] = Path(
        "build/report.html"
    ),
    data: CalibrationData = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    as_json: Json = False,
) -> None:
    """Build every engine that this machine can, and compare size, speed and accuracy."""
    from aisle.build.compare import COLUMNS
    from aisle.build.compare import compare as run
    from aisle.build.material import Table

    result = run(checkpoint, html, Table(data, text_column, label_column) if data else None)
    report(result, as_json, lambda r: show_rows(COLUMNS, r["rows"]))


def _show_build(result: dict[str, Any], checkpoint: Path, repository: Path) -> None:
    say(f"version {result['version']} of {repository} is {checkpoint}, {result['precision']} on {result['target']}")
    if not result["reused"]:
        texts = f"{result['held_out_texts']} held-out texts"
        say(f"agreement {result['agreement']:.2%}, macro-F1 {result['macro_f1']:.4f} on {texts}")
        if result["gate"]["loosened"]:
            say("its gate was loosened")
