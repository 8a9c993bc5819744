"""Engines: compile a checkpoint, and compare engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aisle.commands import (
    Json,
    LabelColumn,
    Page,
    Precision,
    Repository,
    Sample,
    TextColumn,
    TextWindows,
    report,
    show_rows,
    targets,
)
from aisle.commands.command import Stage, choices, file_to_read, file_to_write, refuse
from aisle.commands.tables import reads_tables
from aisle.console import say
from aisle.errors import InputError

app = Stage()
TENSORRT_ONLY = ("workspace_mb", "version_compatible", "hardware_compatible", "timing_cache")

Source = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A folder that `aisle train` made, or a fine-tuned classifier of transformers (folder or hub name).",
    ),
]
HeldOut = Annotated[
    Path | None,
    typer.Option(
        callback=file_to_read,
        help="A table of texts to check the engine with; if the checkpoint has no sample, to calibrate it too.",
    ),
]


@app.command()
@reads_tables
def build(
    ctx: typer.Context,
    checkpoint: Source,
    data: Sample = None,
    repository: Repository = Path("model_repository"),
    target: Annotated[
        str | None,
        choices(targets, "openvino, cuda, tensorrt or tensorrt-rtx.", "TensorRT or cuda on a GPU, OpenVINO on a CPU"),
    ] = None,
    precision: Precision = None,
    held_out: HeldOut = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a text; the rest is cut off. A multiple of 64.", show_default="as in training"),
    ] = None,
    windows: TextWindows = 1,
    gate: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="AGREEMENT F1_LOSS",
            help="Other limits of the accuracy gate, for example 0.98 0.01.",
            show_default="the gate of the precision",
        ),
    ] = None,
    workspace_mb: Annotated[int, typer.Option(min=1, help="TensorRT: GPU memory for the compilation, in MiB.")] = 4096,
    version_compatible: Annotated[bool, typer.Option(help="TensorRT: a plan that later versions can load.")] = False,
    hardware_compatible: Annotated[bool, typer.Option(help="TensorRT: a plan that other GPUs can run.")] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(callback=file_to_write, help="TensorRT: the file that keeps kernel timings.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile a checkpoint into an engine, check it, and add it to the model repository as the next version."""
    _check_columns(ctx, data, held_out)
    from aisle.build.build import build as run
    from aisle.build.compile_tensorrt import CompilerOptions
    from aisle.build.engine import best_target
    from aisle.build.gate import Gate
    from aisle.build.inputs import DataSource, TextSource

    if max_tokens is not None and max_tokens not in range(64, 8193, 64):
        raise InputError(f"--max-tokens {max_tokens}: give a multiple of 64 from 64 to 8192")
    if gate and not (0 <= gate[0] <= 1 and 0 <= gate[1] <= 1):
        raise InputError(f"--gate {gate[0]:g} {gate[1]:g}: give two shares, such as 0.98 0.01")
    if (target or best_target()) == "openvino":
        refuse(ctx, *TENSORRT_ONLY, because="has no effect on OpenVINO; choose --target tensorrt or tensorrt-rtx")
    result = run(
        checkpoint,
        repository,
        target,
        precision,
        data=DataSource(data, text_column, label_column) if data else None,
        held_out=TextSource(held_out, text_column) if held_out else None,
        max_tokens=max_tokens,
        windows=windows,
        gate=Gate(*gate) if gate else None,
        options=CompilerOptions(workspace_mb, version_compatible, hardware_compatible, timing_cache),
    )
    others = () if repository == Path("model_repository") else ("--repository", repository)
    done = f"version {result['version']} in {repository}"
    following = (done, "aisle", "serve", *others) if result["version"] == 1 else (done, "aisle", "deploy", *others)
    report(result, as_json, lambda r: _show_build(r, checkpoint, repository), following)


@app.command()
@reads_tables
def compare(
    ctx: typer.Context,
    checkpoint: Source,
    data: Sample = None,
    html: Page = Path("build/report.html"),
    held_out: HeldOut = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    as_json: Json = False,
) -> None:
    """Build every engine that this machine supports, and compare size, speed and accuracy."""
    _check_columns(ctx, data, held_out)
    from aisle.build.compare import COLUMNS
    from aisle.build.compare import compare as run
    from aisle.build.inputs import DataSource, TextSource

    table = DataSource(data, text_column, label_column) if data else None
    result = run(checkpoint, html, table, TextSource(held_out, text_column) if held_out else None)
    report(result, as_json, lambda r: show_rows(COLUMNS, r["rows"]), (f"page in {html}", "aisle", "build", checkpoint))


def _check_columns(ctx: typer.Context, data: Path | None, held_out: Path | None) -> None:
    """Refuse column names if there is no file with columns."""
    if data is None:
        refuse(ctx, "label_column", because="needs DATA")
        if held_out is None:
            refuse(ctx, "text_column", because="needs DATA or --held-out FILE")


def _show_build(result: dict[str, Any], checkpoint: Path, repository: Path) -> None:
    say(f"version {result['version']} of {repository} is {checkpoint}, {result['precision']} on {result['target']}")
    if not result["reused"]:
        texts = f"{result['held_out_texts']} held-out texts"
        micro = f"micro-F1 {result['micro_f1']:.4f}, " if "micro_f1" in result else ""
        say(f"agreement {result['agreement']:.2%}, {micro}macro-F1 {result['macro_f1']:.4f} on {texts}")
        for name, agreement in result.get("attributes", {}).items():
            say(f"{name}: agreement {agreement:.2%}")
        if result["gate"]["loosened"]:
            say("its gate was loosened")
