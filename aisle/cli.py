"""The `aisle` command: one thin function a command, each over the folder of its stage."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from aisle.console import print_json, say, stdout, track
from aisle.errors import InputError, ServerError

app = typer.Typer(
    help="Product text in, category out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
TextColumn = Annotated[str, typer.Option(help="The column that holds the text.")]
LabelColumn = Annotated[str, typer.Option(help="The column that holds the category.")]
Repository = Annotated[Path, typer.Option(help="The model repository.")]
Url = Annotated[str, typer.Option(help="HOST:PORT of the server's gRPC endpoint.")]
TopK = Annotated[int, typer.Option(help="How many categories a text gets.")]

# What each extra brings, so that a missing module can name it.
EXTRAS = {
    "torch": "train",
    "transformers": "train",
    "sklearn": "train",
    "tokenizers": "train",
    "pyarrow": "parquet",
    "matplotlib": "report",
    "jinja2": "report",
    "onnx": "build",
    "onnxscript": "build",
    "openvino": "build",
    "onnxruntime": "build",
    "locust": "loadtest",
}


def main() -> None:
    """Run the command; errors the user can mend are one line on stderr, never a traceback."""
    try:
        app(standalone_mode=False)
    except InputError as error:
        _exit(2, str(error))
    except ServerError as error:
        _exit(1, str(error))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _exit(2, f"this command needs an extra: pip install 'aisle[{extra}]'")
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        # typer's own usage errors, told by their exit code so as not to depend on its private classes
        if hasattr(error, "format_message"):
            _exit(2, error.format_message())
        if type(error).__name__ == "GateError":
            _exit(3, str(error))
        raise


def _exit(code: int, message: str) -> None:
    say("aisle: " + " ".join(message.split()))
    sys.exit(code)


def report(result: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    if as_json:
        print_json(result)
    else:
        show(result)


@app.command()
def sample(
    out: Annotated[Path, typer.Option("-o", "--output", help="The table to write.")],
    rows: Annotated[int, typer.Option(min=1)] = 16000,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Write the sample catalogue: SYNTHETIC product titles with their categories."""
    from aisle.train.catalogue import write_sample

    report(write_sample(out, rows, seed), as_json, lambda r: say(f"{r['rows']} synthetic rows in {out}"))


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Labelled texts: CSV, TSV, JSONL (or .gz) or Parquet.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The checkpoint folder to write.")],
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    model: Annotated[str, typer.Option(help="A Hugging Face BERT (folder or hub name), or 'scratch'.")] = "scratch",
    epochs: Annotated[int, typer.Option(min=1)] = 2,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 5e-4 from scratch, 3e-5 otherwise.")] = None,
    max_tokens: Annotated[int, typer.Option(min=8, max=512, help="Tokens of a text; the rest is cut off.")] = 128,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Train a classifier; a fifth of the texts is held out to measure it."""
    from aisle.train.train import Settings
    from aisle.train.train import train as run

    settings = Settings(model, epochs, batch_size, learning_rate, max_tokens=max_tokens, seed=seed)
    report(run(data, text_column, label_column, out, settings), as_json, _show_metrics)


@app.command()
def evaluate(
    what: Annotated[list[Path], typer.Argument(metavar="[CHECKPOINT] DATA", help="CHECKPOINT only without --url.")],
    url: Annotated[str, typer.Option(help="HOST:PORT of a running server to evaluate instead.")] = "",
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    held_out: Annotated[bool, typer.Option("--held-out", help="Only the fifth that training held out.")] = False,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint, or what a server answers, on labelled texts."""
    from aisle.train.evaluate import evaluate as run

    if len(what) != (1 if url else 2):
        raise InputError("give either CHECKPOINT DATA, or --url HOST:PORT DATA")
    checkpoint = None if url else what[0]
    result = run(what[-1], text_column, label_column, checkpoint=checkpoint, url=url, held_out=held_out)
    report(result, as_json, _show_metrics)


@app.command()
def build(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `aisle train` made.")],
    repository: Repository = Path("model_repository"),
    target: Annotated[str, typer.Option(help="openvino (CPU) or onnxruntime (GPU).")] = "openvino",
    precision: Annotated[str | None, typer.Option(help="bf16 or fp32; by default the target's fastest.")] = None,
    as_json: Json = False,
) -> None:
    """Compile a checkpoint into the next version of the model repository."""
    from aisle.build.build import build as run

    report(
        run(checkpoint, repository, target, precision),
        as_json,
        lambda r: say(f"version {r['version']} of {repository} is {checkpoint}, {r['precision']} on {r['target']}"),
    )


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
def loadtest(
    data: Annotated[Path, typer.Argument(help="A table of texts to send.")],
    text_column: TextColumn = "text",
    url: Url = "localhost:8001",
    users: Annotated[int, typer.Option(min=1, help="Callers at once, one text each.")] = 32,
    seconds: Annotated[int, typer.Option(min=1)] = 30,
    html: Annotated[Path, typer.Option(help="The report to write.")] = Path("loadtest/report/locust.html"),
    as_json: Json = False,
) -> None:
    """Measure a running server under load, with Locust."""
    from aisle.loadtest.run import loadtest as run

    report(
        run(data, text_column, url, users, seconds, html),
        as_json,
        lambda r: say(f"{r['texts_per_second']} texts/s, p50 {r['p50_ms']} ms, p99 {r['p99_ms']} ms; see {html}"),
    )


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


def _show_metrics(result: dict[str, Any]) -> None:
    table = Table("category", "precision", "recall", "F1", "rows")
    for name, row in result["per_class"].items():
        figures = (f"{row[key]:.3f}" for key in ("precision", "recall", "f1"))
        table.add_row(Text(name), *figures, str(row["support"]))
    stdout.print(table)
    stdout.print(f"accuracy {result['accuracy']:.4f}, macro-F1 {result['macro_f1']:.4f}, {result['seconds']} s")


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
