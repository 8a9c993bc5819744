"""The `aisle` command: one thin function a command, each over the folder of its stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from aisle.console import print_json, say, stderr, stdout, track
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
CalibrationData = Annotated[
    Path | None,
    typer.Option(help="The training table, to calibrate and check with, where the checkpoint has no sample."),
]
Repository = Annotated[Path, typer.Option(help="The model repository.")]
Url = Annotated[str, typer.Option(help="HOST:PORT of the server's gRPC endpoint.")]
Model = Annotated[str, typer.Option(help="A Hugging Face BERT (folder or hub name), or 'scratch'.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts a step, on all devices together.")]
LearningRate = Annotated[
    float | None,
    typer.Option(min=0, help="At its highest; default: 5e-4 from scratch, 3e-5 for a BERT-base."),
]
MaxTokens = Annotated[int, typer.Option(min=8, max=512, help="Tokens of a text; the rest is cut off.")]
Accumulate = Annotated[int, typer.Option(min=1, help="Compute a step's texts in so many parts, to save memory.")]
SaveEvery = Annotated[
    int | None, typer.Option(min=1, help="Steps that a kill can lose; default: as few as cost under 2 % of the time.")
]
LogDir = Annotated[Path | None, typer.Option(help="Log to TensorBoard here.")]
TopK = Annotated[int, typer.Option(help="How many categories a text gets.")]

# What each extra brings, so that a missing module can name it.
EXTRAS = {
    "torch": "train",
    "transformers": "train",
    "sklearn": "train",
    "datasketch": "clean",
    "optuna": "train",
    "tensorboard": "train",
    "tokenizers": "train",
    "pypinyin": "train",
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
        if type(error).__name__ == "GateError":  # by name, so that the thin client does without its module
            _show_gate(error)
            _exit(3, str(error))
        raise


def _exit(code: int, message: str) -> None:
    say("aisle: " + " ".join(message.split()))
    sys.exit(code)


def report(result: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """Print a result; of the processes that torchrun starts, the first does."""
    if os.environ.get("RANK", "0") != "0":
        return
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
def clean(
    data: Annotated[Path, typer.Argument(help="Labelled texts: CSV, TSV, JSONL (or .gz) or Parquet.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The table to write.")],
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    near: Annotated[
        float, typer.Option(min=0, max=1, help="Jaccard similarity of near-duplicates; 0 keeps them all.")
    ] = 0.8,
    page: Annotated[
        Path | None, typer.Option("--report", help="The HTML report; by default beside the table, with a .json.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Clean a table of any size: copies, conflicting labels, personal data; with a report."""
    from aisle.preprocess.quality import clean_file

    result = clean_file(data, out, text_column, label_column, near, page, lambda rows: track(rows, "cleaning"))
    report(result, as_json, _show_cleaning)


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Labelled texts: CSV, TSV, JSONL (or .gz) or Parquet.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The checkpoint folder to write.")],
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    model: Model = "scratch",
    epochs: Annotated[int, typer.Option(min=1)] = 2,
    batch_size: BatchSize = 64,
    learning_rate: LearningRate = None,
    max_tokens: MaxTokens = 128,
    dropout: Annotated[float, typer.Option(min=0, max=0.9)] = 0.1,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.01,
    layer_decay: Annotated[
        float | None,
        typer.Option(min=0.1, max=1, help="Rate of a layer to the next; default: 0.95, from scratch 1."),
    ] = None,
    class_weight: Annotated[
        float, typer.Option(min=0, max=1, help="0: all rows count alike, 1: all categories, 0.5: between.")
    ] = 0.0,
    focal: Annotated[float, typer.Option(min=0, help="Gamma of the focal loss; 0 is plain cross-entropy.")] = 0.0,
    label_smoothing: Annotated[float, typer.Option(min=0, max=0.9)] = 0.0,
    level_weight: Annotated[
        float, typer.Option(min=0, help="Of the loss at each level above the leaves, in categories like 'A > B > C'.")
    ] = 0.0,
    augment: Annotated[
        list[str] | None, typer.Option(help="Vary the texts by a technique; give it once for each.")
    ] = None,
    augment_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of a text that is varied.")] = 0.3,
    class_floor: Annotated[int, typer.Option(min=0, help="Repeat rows of rarer categories up to so many.")] = 0,
    mixup: Annotated[float, typer.Option(min=0, help="Mix the embeddings of two texts by beta(a, a).")] = 0.0,
    accumulate: Accumulate = 1,
    patience: Annotated[int, typer.Option(min=1, help="Stop after so many epochs that got no better.")] = 2,
    folds: Annotated[int, typer.Option(min=0, help="Cross-validate in so many folds first.")] = 0,
    seed: int = 0,
    save_every: SaveEvery = None,
    log_dir: LogDir = None,
    as_json: Json = False,
) -> None:
    """Train a classifier; a fifth of the texts is held out to measure it.

    Started again after a kill it goes on. `torchrun --nproc-per-node N -m aisle train …` uses N devices.
    """
    from aisle.train.settings import Settings
    from aisle.train.train import train as run

    settings = Settings(
        model=model,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        dropout=dropout,
        max_tokens=max_tokens,
        seed=seed,
        augment=tuple(augment or ()),
        augment_rate=augment_rate,
        class_floor=class_floor,
        mixup=mixup,
        layer_decay=layer_decay,
        class_weight=class_weight,
        focal=focal,
        label_smoothing=label_smoothing,
        level_weight=level_weight,
        accumulate=accumulate,
        patience=patience,
        folds=folds,
    )
    result = run(data, text_column, label_column, out, settings, save_every=save_every, log_dir=log_dir)
    report(result, as_json, _show_training)


@app.command()
def pretrain(
    data: Annotated[list[Path], typer.Argument(help="Tables of texts; labels are not needed.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The folder to write, for `aisle train --model`.")],
    text_column: TextColumn = "text",
    model: Model = "scratch",
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    batch_size: BatchSize = 64,
    learning_rate: LearningRate = None,
    max_tokens: MaxTokens = 128,
    accumulate: Accumulate = 1,
    seed: int = 0,
    save_every: SaveEvery = None,
    log_dir: LogDir = None,
    as_json: Json = False,
) -> None:
    """Teach a BERT the language of texts without labels, by masked words; what `aisle train` holds out is left out."""
    from aisle.train.pretrain import pretrain as run
    from aisle.train.settings import Settings

    settings = Settings(
        model, epochs, batch_size, learning_rate, max_tokens=max_tokens, accumulate=accumulate, seed=seed
    )
    result = run(data, text_column, out, settings, save_every=save_every, log_dir=log_dir)
    report(result, as_json, lambda r: say(f"{out}: {r['epochs'][-1]['accuracy']:.1%} of the masked words guessed"))


@app.command()
def search(
    data: Annotated[Path, typer.Option(help="Labelled texts: CSV, TSV, JSONL (or .gz) or Parquet.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The folder of the search; it goes on from there.")],
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    trials: Annotated[int, typer.Option(min=1, help="Settings to try, in all.")] = 20,
    model: Model = "scratch",
    epochs: Annotated[int, typer.Option(min=1, help="Of each trial.")] = 2,
    max_tokens: MaxTokens = 128,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Search for the best settings of `aisle train`; the held-out fifth is not looked at."""
    from aisle.train.search import search as run
    from aisle.train.settings import Settings

    settings = Settings(model, epochs, max_tokens=max_tokens, seed=seed)
    result = run(data, text_column, label_column, out, settings, trials)
    report(result, as_json, _show_search)


@app.command()
def ablate(
    data: Annotated[Path, typer.Argument(help="Labelled texts: CSV, TSV, JSONL (or .gz) or Parquet.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The folder of the ablation; it goes on from there.")],
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    technique: Annotated[
        list[str] | None, typer.Option(help="Give it once for each.", show_default="all there are")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Texts that each training draws.")] = 4000,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings with each technique.")] = 3,
    model: Model = "scratch",
    epochs: Annotated[int, typer.Option(min=1)] = 4,
    max_tokens: MaxTokens = 64,
    augment_rate: Annotated[float, typer.Option(min=0, max=1, help="Probability that a text is varied.")] = 0.5,
    as_json: Json = False,
) -> None:
    """Measure what each augmentation adds to training; the held-out fifth is not looked at."""
    from aisle.train.ablate import COLUMNS, NAMES
    from aisle.train.ablate import ablate as run
    from aisle.train.settings import Settings

    settings = Settings(model, epochs, max_tokens=max_tokens, augment_rate=augment_rate)
    techniques = tuple(technique or NAMES)
    result = run(data, text_column, label_column, out, settings, rows=rows, seeds=seeds, techniques=techniques)
    report(result, as_json, lambda r: _show_rows(COLUMNS, r["techniques"]))


@app.command()
def evaluate(
    what: Annotated[list[Path], typer.Argument(metavar="[CHECKPOINT] DATA", help="CHECKPOINT only without --url.")],
    url: Annotated[str, typer.Option(help="HOST:PORT of a running server to evaluate instead.")] = "",
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    held_out: Annotated[bool, typer.Option("--held-out", help="Only the fifth that training held out.")] = False,
    baselines: Annotated[
        Path | None, typer.Option(help="A table; an SVM and keyword rules fitted on its training part compete.")
    ] = None,
    page: Annotated[Path | None, typer.Option("--report", help="The HTML page to write.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint, or what a server answers, on labelled texts."""
    from aisle.train.evaluate import evaluate as run

    if len(what) != (1 if url else 2):
        raise InputError("give either CHECKPOINT DATA, or --url HOST:PORT DATA")
    checkpoint = None if url else what[0]
    result = run(
        what[-1],
        text_column,
        label_column,
        checkpoint=checkpoint,
        url=url,
        held_out=held_out,
        baselines=baselines,
        report=page,
    )
    report(result, as_json, _show_evaluation)


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
    report(result, as_json, lambda r: _show_rows(COLUMNS, r["rows"]))


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


def _show_cleaning(result: dict[str, Any]) -> None:
    table = Table("dropped", "rows", "first of them")
    for reason, rows in result["dropped"].items():
        table.add_row(reason, str(rows), ", ".join(map(str, result["examples"][reason])))
    stdout.print(table)
    stdout.print(f"{result['rows_kept']} of {result['rows_in']} rows in {result['output']}; see {result['report']}")


def _show_metrics(result: dict[str, Any]) -> None:
    table = Table("category", "precision", "recall", "F1", "rows")
    for name, row in result["per_class"].items():
        figures = (f"{row[key]:.3f}" for key in ("precision", "recall", "f1"))
        table.add_row(Text(name), *figures, str(row["support"]))
    stdout.print(table)
    stdout.print(f"accuracy {result['accuracy']:.4f}, macro-F1 {result['macro_f1']:.4f}, {result['seconds']} s")


def _show_training(result: dict[str, Any]) -> None:
    _show_metrics(result)
    if "cross_validation" in result:
        mean, deviation = result["cross_validation"]["mean"], result["cross_validation"]["deviation"]
        spread = ", ".join(f"{name} {mean[name]:.4f} ± {deviation[name]:.4f}" for name in mean)
        stdout.print(f"over {len(result['cross_validation']['folds'])} folds: {spread}")


def _show_search(result: dict[str, Any]) -> None:
    names = list(result["best"]["settings"])
    table = Table("score", *names)
    for trial in sorted(result["trials"], key=lambda trial: trial["score"] or 0.0, reverse=True):
        table.add_row(f"{trial['score']:.4f}", *(f"{trial['settings'][name]:.3g}" for name in names))
    stdout.print(table)
    stdout.print(Text(result["train_with"] + " --data … -o …"), soft_wrap=True)


def _show_evaluation(result: dict[str, Any]) -> None:
    _show_metrics(result)
    stdout.print("right among the first " + ", ".join(f"{k}: {share:.4f}" for k, share in result["top_k"].items()))
    for level in result["levels"]:
        stdout.print(f"level {level['level']}: accuracy {level['accuracy']:.4f}, macro-F1 {level['macro_f1']:.4f}")
    calibration = result["calibration"]
    stdout.print(f"calibration error {calibration['ece']:.4f}, temperature left {calibration['temperature']:.3f}")
    for point in result["coverage"]["wanted"]:
        if point["threshold"] is not None:
            answered = f"{point['coverage']:.1%} of the texts, those of confidence {point['threshold']:.4f} and more"
            stdout.print(f"{point['wanted']:.0%} accuracy on {answered}")
    for each in result.get("baselines", ()):
        stdout.print(f"{each['name']}: accuracy {each['accuracy']:.4f}, macro-F1 {each['macro_f1']:.4f}")


def _show_build(result: dict[str, Any], checkpoint: Path, repository: Path) -> None:
    say(f"version {result['version']} of {repository} is {checkpoint}, {result['precision']} on {result['target']}")
    if not result["reused"]:
        texts = f"{result['held_out_texts']} held-out texts"
        say(f"agreement {result['agreement']:.2%}, macro-F1 {result['macro_f1']:.4f} on {texts}")
        if result["gate"]["loosened"]:
            say("its gate was loosened")


def _show_gate(error: Any) -> None:
    """Show what was asked of an engine beside what it does."""
    table = Table("", "asked", "found")
    table.add_row("top-1 agreement", f"≥ {error.row['least_agreement']:.2%}", f"{error.row['agreement']:.2%}")
    table.add_row("macro-F1 loss", f"≤ {error.row['largest_f1_loss']:.2%}", f"{error.row['f1_loss']:.2%}")
    stderr.print(table)


def _show_rows(columns: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """Print rows as a table; `columns` names the keys and their headings."""
    table = Table(*columns.values())
    for row in rows:
        cells = (row.get(key) for key in columns)
        table.add_row(*("–" if c is None else f"{c:.4g}" if isinstance(c, float) else Text(str(c)) for c in cells))
    stdout.print(table)


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
