"""Serving, and calling what is served."""

from __future__ import annotations

import sys
from contextlib import nullcontext
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
    http_port: Annotated[int | None, typer.Option(help="Offers HTTP too, which is plain text.")] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of the metrics; 0.0.0.0 for all.")] = "127.0.0.1",
    metrics_port: int = 8002,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM: the server's certificate; turns TLS on.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM: its private key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM: the authority of the clients; turns mutual TLS on.")
    ] = None,
    model_config_name: Annotated[str, typer.Option(help="Picks MODEL/configs/NAME.pbtxt; 'gpu' on a GPU.")] = "",
    cache_mb: Annotated[int, typer.Option(min=0, help="Response cache in MiB; 0 turns it off.")] = 256,
    trace_url: Annotated[str, typer.Option(help="OTLP/HTTP endpoint for traces, as http://HOST:4318/v1/traces.")] = "",
    trace_one_in: Annotated[int, typer.Option(min=1, help="Trace one in N of the requests without a trace.")] = 1000,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log one JSON object a line.")] = False,
) -> None:
    """Serve the model repository with Triton until stopped: restarted when it fails, changed by `aisle deploy`."""
    from aisle.deploy.access import ServerTLS
    from aisle.deploy.logs import stderr_as_json
    from aisle.deploy.supervise import serve_forever
    from aisle.deploy.triton import Options

    if (tls_cert is None) != (tls_key is None) or (tls_client_ca and not tls_cert):
        raise InputError("TLS needs both --tls-cert and --tls-key; mutual TLS needs --tls-client-ca besides")
    if log_json:
        stderr_as_json()
    options = Options(
        repository,
        host,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
        tls=ServerTLS(tls_cert, tls_key, tls_client_ca) if tls_cert and tls_key else None,
        model_config_name=model_config_name,
        cache_mb=cache_mb,
        trace_url=trace_url,
        trace_one_in=trace_one_in,
    )
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
    log: Annotated[Path | None, typer.Option(help="Append what was answered, for `aisle drift`; no texts.")] = None,
    keep_text: Annotated[bool, typer.Option("--keep-text", help="Log the texts too, for `aisle review`.")] = False,
    as_json: Json = False,
) -> None:
    """Classify texts, or every row of a file; a stopped file goes on where it was."""
    from aisle.client import Classifier, TrafficLog
    from aisle.client.bulk import classify_file

    if keep_text and log is None:
        raise InputError("--keep-text is about a log; say with --log where it is")
    with (
        TrafficLog(log, keep_text) if log else nullcontext() as traffic,
        Classifier.from_environment(url, timeout=timeout, log=traffic) as classifier,
    ):
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
