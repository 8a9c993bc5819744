"""Serving, and calling what is served."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from aisle.commands import Json, Repository, TextColumn, Url, report
from aisle.console import say, stdout, track
from aisle.errors import InputError

app = typer.Typer()
TopK = Annotated[int, typer.Option(help="How many categories a text gets.")]


@app.command()
def serve(
    repository: Repository = Path("model_repository"),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    grpc_port: int = 8001,
    http_port: int = 8000,
    metrics_port: int = 8002,
    model_config_name: Annotated[str, typer.Option(help="Picks MODEL/configs/NAME.pbtxt; 'gpu' on a GPU.")] = "",
    cache_mb: Annotated[int, typer.Option(min=0, help="Response cache in MiB; 0 turns it off.")] = 256,
) -> None:
    """Serve the model repository with Triton until stopped."""
    from aisle.deploy.triton import Options, serve_forever

    options = Options(repository, host, grpc_port, http_port, metrics_port, model_config_name, cache_mb)
    sys.exit(serve_forever(options))


@app.command()
def classify(
    what: Annotated[list[str], typer.Argument(metavar="TEXT… | FILE", help="Texts, or one file with -o.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write: .jsonl, .csv, .parquet.")
    ] = None,
    url: Url = "localhost:8001",
    top_k: TopK = 1,
    text_column: TextColumn = "text",
    timeout: Annotated[float, typer.Option(help="Seconds a request may take.")] = 10.0,
    as_json: Json = False,
) -> None:
    """Classify texts, or every row of a file; a stopped file goes on where it was."""
    from aisle.client import Classifier
    from aisle.client.bulk import classify_file

    with Classifier(url, timeout=timeout) as classifier:
        if out is not None:
            if len(what) != 1:
                raise InputError("-o takes one file at a time")
            result = classify_file(
                classifier,
                Path(what[0]),
                out,
                text_column,
                top_k,
                lambda rows, n: track(rows, "classifying", n),
            )
            report(result, as_json, lambda r: say(f"{r['rows']} rows, {r['errors']} errors: {out}"))
            return
        if len(what) == 1 and Path(what[0]).is_file():
            raise InputError(f"{what[0]} is a file; say with -o where its categories go")
        answers = classifier.classify(what, top_k)
    rows = [
        {"text": text, "categories": answer.categories, "confidences": answer.confidences}
        for text, answer in zip(what, answers, strict=True)
    ]
    report({"predictions": rows}, as_json, _show_predictions)


@app.command()
def demo(
    texts: Annotated[Path | None, typer.Argument(help="A file of texts to classify.", show_default="a dozen")] = None,
    repository: Repository = Path("model_repository"),
    as_json: Json = False,
) -> None:
    """Go the whole way on the synthetic sample: train, build, serve, classify; nothing is left running."""
    from aisle.demo import TEXTS
    from aisle.demo import demo as run

    report(run(Path("work"), repository, texts or TEXTS), as_json, _show_demo)


def _show_predictions(result: dict[str, Any]) -> None:
    table = Table("text", "category", "confidence")
    for row in result["predictions"]:
        for rank, (category, confidence) in enumerate(zip(row["categories"], row["confidences"], strict=True)):
            table.add_row(Text("" if rank else row["text"]), Text(category), f"{confidence:.4f}")
    stdout.print(table)


def _show_demo(result: dict[str, Any]) -> None:
    table = Table("text", "category", "confidence", "latency", title="a model trained on a SYNTHETIC catalogue")
    for row in result["predictions"]:
        figures = f"{row['confidence']:.4f}", f"{row['milliseconds']:.1f} ms"
        table.add_row(Text(row["text"]), Text(row["category"]), *figures)
    stdout.print(table)
