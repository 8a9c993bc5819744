"""Serving: start a server, and classify texts with it."""

from __future__ import annotations

import os
import re
import sys
from contextlib import nullcontext
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aisle.commands import (
    Json,
    LabelColumn,
    OutputTable,
    Repository,
    TextColumn,
    Url,
    data_argument,
    other_columns,
    report,
)
from aisle.commands.command import (
    Stage,
    file_to_read,
    file_to_write,
    folder_to_write,
    refuse,
    resumable,
    table_to_write,
)
from aisle.commands.tables import reads_tables, refuse_two_on_stdout, writes_tables
from aisle.console import cell, new_table, say, show, stdout, track
from aisle.errors import InputError
from aisle.preprocess.tables.place import is_database

if TYPE_CHECKING:
    from aisle.client import Prediction

app = Stage()
Folder = Annotated[Path, typer.Option(callback=folder_to_write, help="The folder of the desk's own files.")]
TextsOrFile = Annotated[list[str], typer.Argument(metavar="TEXT… | FILE", help="Texts; or, with -o, one file.")]
Timeout = Annotated[float, typer.Option(min=0.001, help="Time limit of a request, in seconds.")]
TopK = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of categories for each text.",
        show_default="1; of a multi-label model, those that reach their thresholds",
    ),
]


@app.command()
def serve(
    ctx: typer.Context,
    repository: Repository = Path("model_repository"),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of gRPC.")] = 8001,
    http_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of HTTP, which is not encrypted.", show_default="off")
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of the metrics; 0.0.0.0 for all.")] = "127.0.0.1",
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the metrics.")] = 8002,
    tls_cert: Annotated[
        Path | None, typer.Option(callback=file_to_read, help="PEM: the server's certificate; turns TLS on.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(callback=file_to_read, help="PEM: the server's private key.")] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(callback=file_to_read, help="PEM: the authority of the clients; turns mutual TLS on."),
    ] = None,
    model_config_name: Annotated[
        str, typer.Option(help="Use MODEL/configs/NAME.pbtxt; 'gpu' on a GPU.", show_default="config.pbtxt")
    ] = "",
    cache_mb: Annotated[
        int, typer.Option(min=0, help="Size of the answer cache in each encoder process, in MiB; 0 turns it off.")
    ] = 256,
    trace_url: Annotated[
        str, typer.Option(help="OTLP/HTTP endpoint for traces, such as http://HOST:4318/v1/traces.")
    ] = "",
    trace_one_in: Annotated[int, typer.Option(min=1, help="Trace one in N of the requests without a trace.")] = 1000,
    log_json: Annotated[bool, typer.Option(help="Log JSON objects, one per line.")] = False,
) -> None:
    """Serve the model repository with Triton until stopped. Failures restart it; `aisle deploy` changes the model."""
    from aisle.deploy.server.access import ServerTLS
    from aisle.deploy.server.logs import stderr_as_json
    from aisle.deploy.server.supervise import serve_forever
    from aisle.deploy.server.triton import ServerOptions

    if (tls_cert is None) != (tls_key is None) or (tls_client_ca and not tls_cert):
        raise InputError("TLS needs both --tls-cert and --tls-key; mutual TLS also needs --tls-client-ca")
    if not trace_url:
        refuse(ctx, "trace_one_in", because="needs --trace-url URL")
    elif not re.match(r"https?://[^/]+", trace_url):
        raise InputError(f"--trace-url {trace_url}: give an OTLP/HTTP endpoint, such as http://HOST:4318/v1/traces")
    _check_addresses(("--host", host), ("--metrics-host", metrics_host))
    _check_memory(cache_mb)
    ports = [port for port in (grpc_port, http_port, metrics_port) if port is not None]
    if len({*ports}) < len(ports):
        raise InputError("gRPC, HTTP and metrics need different ports")
    if log_json:
        stderr_as_json()
    options = ServerOptions(
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
def rest(
    url: Url = "localhost:8001",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of HTTP.")] = 8080,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes that share the port.")] = 1,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Time limit of a request to the server, in seconds.")
    ] = 10.0,
    tls_cert: Annotated[
        Path | None, typer.Option(callback=file_to_read, help="PEM: this front's certificate; turns HTTPS on.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(callback=file_to_read, help="PEM: this front's private key.")] = None,
) -> None:
    """Serve HTTP and JSON in front of a running server or its gateway, until stopped. /docs describes it.

    It reaches the server as the other commands do: TLS by AISLE_TLS_CA. Callers of a gateway send their own tokens;
    AISLE_TOKEN is for the health checks alone.
    """
    from aisle.client import TLS
    from aisle.deploy.rest.front import Upstream
    from aisle.deploy.rest.server import RestOptions, serve_rest

    _check_tls(tls_cert, tls_key)
    _check_addresses(("--host", host))
    upstream = Upstream(url, timeout, TLS.from_environment(), os.environ.get("AISLE_TOKEN", ""))
    serve_rest(RestOptions(upstream, host, port, workers, tls_cert, tls_key))


@app.command()
def desk(
    folder: Folder = Path("work/desk"),
    url: Url = "localhost:8001",
    host: Annotated[
        str, typer.Option(help="Address to listen on. Anything but this machine's own needs people who log in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of HTTP.")] = 8090,
    repository: Repository = Path("model_repository"),
    checkpoint: Annotated[
        Path | None, typer.Option(help="The checkpoint of the live model: for quality, and to retrain it.")
    ] = None,
    data: Annotated[Path | None, typer.Option(callback=file_to_read, help="The checkpoint's training table.")] = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    log: Annotated[
        Path | None, typer.Option(callback=file_to_read, help="A log of live traffic, to show drift.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(callback=file_to_read, help="PEM: the desk's certificate; turns HTTPS on.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(callback=file_to_read, help="PEM: the desk's private key.")] = None,
) -> None:
    """Serve web pages where a team tries, reviews, corrects, retrains and rolls out, until stopped.

    It reaches the server as the other commands do. --text-column and --label-column are those of --data.
    """
    from aisle.deploy.desk.desk import DeskOptions
    from aisle.deploy.desk.server import serve_desk

    _check_tls(tls_cert, tls_key)
    _check_addresses(("--host", host))
    options = DeskOptions(
        url,
        folder.resolve(),
        host,
        port,
        repository.resolve(),
        checkpoint and checkpoint.resolve(),
        data and data.resolve(),
        text_column,
        label_column,
        log and log.resolve(),
        tls_cert,
        tls_key,
    )
    serve_desk(options)


@app.command(name="desk-user")
def desk_user(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The person's name.")],
    folder: Folder = Path("work/desk"),
    remove: Annotated[bool, typer.Option(help="Remove the person, who is logged out at once.")] = False,
    as_json: Json = False,
) -> None:
    """Add a person to the desk, or change a password. It is asked for, or read from standard input."""
    from aisle.deploy.desk.users import Users

    users = Users(folder / "users.json")
    if remove:
        users.remove(name)
    else:
        users.set_password(name, _password(name))
    report({"name": name, "people": users.names()}, as_json, lambda each: show(f"people: {', '.join(each['people'])}"))


def _password(name: str) -> str:
    """Ask for a password twice, or read it from standard input if that is no terminal."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    first, again = getpass(f"password of {name}: "), getpass("again: ")
    if first != again:
        raise InputError("the two passwords differ; run the command again")
    return first


def _check_tls(certificate: Path | None, key: Path | None) -> None:
    """Refuse half of a pair, and files that are no certificate and key.

    Raises:
        InputError: they cannot be used.
    """
    from aisle.deploy.server.access import ServerTLS

    if (certificate is None) != (key is None):
        raise InputError("TLS needs both --tls-cert and --tls-key")
    if certificate and key:
        ServerTLS(certificate, key).arguments()


def _check_addresses(*options: tuple[str, str]) -> None:
    """Refuse an empty address, because it would listen on all addresses."""
    for option, address in options:
        if not address.strip():
            raise InputError(f"{option} is empty; give an address, such as 127.0.0.1, or 0.0.0.0 for all")


def _check_memory(cache_mb: int) -> None:
    """Refuse an answer cache that is larger than this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    if cache_mb > memory:
        raise InputError(f"--cache-mb {cache_mb}: this machine has {memory} MiB of memory; give less")


@app.command()
@reads_tables
@writes_tables
def classify(
    ctx: typer.Context,
    what: TextsOrFile,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", callback=table_to_write, help="The file to write: .jsonl, .csv, .parquet; or a database."
        ),
    ] = None,
    url: Url = "localhost:8001",
    top_k: TopK = None,
    decisions: Annotated[
        bool | None,
        typer.Option(
            "--decisions/--no-decisions",
            help="Add the decision: accept, review or unknown.",
            show_default="on if the model has decisions",
        ),
    ] = None,
    also: Annotated[
        bool, typer.Option("--also/--no-also", help="Add each attribute that the model knows, and its confidence.")
    ] = False,
    taxonomy: Annotated[
        Path | None,
        typer.Option(
            callback=file_to_read,
            help="Also write each category's counterpart, from a table of `aisle category map`.",
        ),
    ] = None,
    text_column: TextColumn = "text",
    timeout: Timeout = 10.0,
    log: Annotated[
        Path | None,
        typer.Option(callback=file_to_write, help="Append the answers to a log for `aisle drift`, without texts."),
    ] = None,
    keep_text: Annotated[bool, typer.Option(help="Log the texts too, for `aisle review`.")] = False,
    shard: Annotated[
        str,
        typer.Option(
            metavar="N/COUNT",
            help="Classify this share of the rows into a part file of -o; job/COUNT takes N from a Kubernetes Job.",
        ),
    ] = "",
    key: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="With a database as -o: a row replaces the one with the same key."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="Read only rows that are new by this column: not below its greatest value in -o."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Classify texts, or every row of a file or of a database's table. A file that was stopped resumes."""
    from aisle.client import Classifier, TrafficLog
    from aisle.client.bulk import classify_file
    from aisle.client.taxonomy import read_mapping
    from aisle.preprocess.tables.shard import read_shard

    _check_classify(ctx, what, out, log, keep_text, as_json)
    share = read_shard(shard) if shard else None
    counterparts = read_mapping(taxonomy) if taxonomy else None
    with (
        TrafficLog(log, keep_text) if log else nullcontext() as traffic,
        Classifier.from_environment(url, timeout=timeout, log=traffic) as classifier,
    ):
        if out is not None:
            with resumable(_after_stop(out, since)):
                result = classify_file(
                    classifier,
                    Path(what[0]),
                    out,
                    text_column,
                    top_k,
                    lambda rows, n: track(rows, "classifying", n),
                    decisions=decisions,
                    shard=share,
                    attributes=also,
                    taxonomy=counterparts,
                    keys=key or (),
                    since=since,
                )
            written = Path(result["output"])
            report(result, as_json, lambda _: None, _after_file(result, text_column))
            if not shard and not since:  # some bad rows do not spoil the others
                _refuse_only_errors(result, what[0], written)
            return
        if decisions is None:
            decisions = classifier.has_decisions()
        answers = classifier.classify(what, top_k, decisions=decisions, attributes=also)
    rows = [_row(text, answer) for text, answer in zip(what, answers, strict=True)]
    report({"predictions": rows}, as_json, _show_predictions)


@app.command()
@reads_tables
def embed(
    ctx: typer.Context,
    what: TextsOrFile,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--output", callback=file_to_write, help="The file to write: .parquet or .npy."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Keep so many numbers of each embedding.", show_default="all that the model gives"),
    ] = None,
    url: Url = "localhost:8001",
    text_column: TextColumn = "text",
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Turn texts, or every row of a file, into embeddings: vectors of length 1, near each other for similar texts."""
    from aisle.client import Classifier
    from aisle.client.embedding import embed_file

    _check_texts_or_file(ctx, what, out)
    with Classifier.from_environment(url, timeout=timeout) as classifier:
        if out is not None:
            source = Path(what[0])
            progress = lambda rows, n: track(rows, "embedding", n)  # noqa: E731
            result = embed_file(classifier, source, out, text_column, progress, size=size)
            embedded = result["rows"] - result["errors"]
            done = f"{embedded} of {result['rows']} rows have an embedding of {result['size']} numbers, in {out}"
            following = ("aisle", "index", out, "-o", "index") if out.suffix == ".parquet" else ()
            report(result, as_json, lambda _: None, (done, *following))
            _refuse_only_errors(result, what[0], out)
            return
        vectors = classifier.embed(what, size=size)
    rows = [{"text": text, "embedding": row.tolist()} for text, row in zip(what, vectors, strict=True)]
    report({"embeddings": rows}, as_json, lambda _: _show_similarity(what, vectors @ vectors.T))


@app.command()
def index(
    vectors: Annotated[
        Path, typer.Argument(metavar="VECTORS", callback=file_to_read, help="A .parquet file of `aisle embed`.")
    ],
    out: Annotated[Path, typer.Option("-o", "--output", callback=folder_to_write, help="The folder to write.")],
    as_json: Json = False,
) -> None:
    """Index embeddings, so that `aisle similar` finds the rows that are most similar to a text."""
    from aisle.client.index import build_index

    result = build_index(vectors, out)
    done = f"{result['rows']} rows in {out}, searched {'exactly' if result['kind'] == 'exact' else 'by a graph'}"
    report(result, as_json, lambda _: None, (done, "aisle", "similar", "TEXT", "--index", out))


@app.command()
def similar(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT…", help="What to look for.")],
    folder: Annotated[Path, typer.Option("--index", help="A folder of `aisle index`.")],
    count: Annotated[int, typer.Option("-k", "--count", min=1, max=1000, help="Rows for each text.")] = 10,
    url: Url = "localhost:8001",
    as_json: Json = False,
) -> None:
    """Show the indexed rows that are most similar to a text, by the embeddings of the running server."""
    from aisle.client import Classifier
    from aisle.client.index import Index

    opened = Index(folder)
    with Classifier.from_environment(url) as classifier:
        vectors, version = classifier.embed_with_version(texts)
        opened.check_model(classifier.fingerprints().get(version, ""))
    found = [
        {"text": text, "hits": [hit._asdict() for hit in hits]}
        for text, hits in zip(texts, opened.search(vectors, count), strict=True)
    ]
    report({"similar": found}, as_json, lambda result: _show_hits(result["similar"]))


@app.command()
@writes_tables
def duplicates(
    folder: Annotated[Path, typer.Argument(metavar="INDEX", help="A folder of `aisle index`.")],
    out: OutputTable,
    similarity: Annotated[
        float, typer.Option(min=0, max=1, help="Cosine similarity of a pair, at least; see metrics.json of the model.")
    ] = 0.93,
    nearest: Annotated[int, typer.Option(min=1, max=1000, help="Rows that are looked at for each row.")] = 20,
    as_json: Json = False,
) -> None:
    """List the pairs of indexed rows that are probably the same product, the most similar first."""
    from aisle.client.index import find_duplicates

    refuse_two_on_stdout(out, as_json)
    progress = lambda starts: track(starts, "comparing", len(starts))  # noqa: E731
    result = find_duplicates(folder, out, similarity, nearest, progress)
    if result["rows_with_more"]:
        say(f"{result['rows_with_more']} rows may have more similar rows than the {nearest} nearest; raise --nearest")
    if result["pairs"] > result["rows"]:
        say("there are more pairs than rows: raise --similarity, or train the model with --contrastive for this")
    report(result, as_json, lambda _: None, (f"{result['pairs']} pairs of {result['rows']} rows in {out}",))


def _show_hits(found: list[dict[str, Any]]) -> None:
    for each in found:
        table = new_table("similarity", "row", "text", title=each["text"])
        for hit in each["hits"]:
            table.add_row(f"{hit['similarity']:.3f}", str(hit["row"]), cell(hit["text"]))
        stdout.print(table)


def _show_similarity(texts: list[str], cosine: Any) -> None:
    """Show how similar the texts are to each other; their vectors say nothing to a reader."""
    table = new_table("text", *map(str, range(1, len(texts) + 1)), title="cosine similarity to text number")
    for number, (text, row) in enumerate(zip(texts, cosine.tolist(), strict=True), start=1):
        table.add_row(cell(f"{number}. {text}"), *(f"{each:.3f}" for each in row))
    stdout.print(table)


def _row(text: str, answer: Prediction) -> dict[str, Any]:
    row: dict[str, Any] = {"text": text, "categories": answer.categories, "confidences": answer.confidences}
    if answer.attributes is not None:
        row["attributes"] = {name: each._asdict() for name, each in answer.attributes.items()}
    if answer.decision is None:
        return row
    return {**row, "decision": answer.decision, "decided": answer.decided, "prediction_set": answer.prediction_set}


def _check_classify(
    ctx: typer.Context, what: list[str], out: Path | None, log: Path | None, keep_text: bool, as_json: bool
) -> None:
    """Check the arguments of `classify`.

    Raises:
        InputError: some do not fit together.
    """
    if keep_text and log is None:
        raise InputError("--keep-text needs --log FILE")
    _check_texts_or_file(ctx, what, out)
    if out is not None:
        refuse_two_on_stdout(out, as_json)
        if log and log.resolve() in (out.resolve(), Path(what[0]).resolve()):
            raise InputError(f"{log} is both the log and a table; choose another log")


def _check_texts_or_file(ctx: typer.Context, what: list[str], out: Path | None) -> None:
    """Check that the arguments are texts or, with an output, one file.

    Raises:
        InputError: they are not.
    """
    if out is None:
        refuse(ctx, *FILE_ONLY, because="needs a file: FILE -o OUTPUT")
        if len(what) == 1 and is_file(what[0]):
            raise InputError(f"{what[0]} is a file; give the output with -o")
    elif len(what) != 1:
        raise InputError("-o takes one file at a time")


def _after_file(result: dict[str, Any], text_column: str) -> tuple[object, ...]:
    """Return what is done, and the next step. Only rows with one category each can be reviewed."""
    out = result["output"]
    done = f"{result['rows']} rows, {result['errors']} errors, {result['warnings']} warnings in {out}"
    if result.get("unmapped"):
        done += f"; {result['unmapped']} rows have a category without a confirmed counterpart"
    text_column = result["renamed"].get(text_column, text_column)
    columns = other_columns(text_column)
    if out == "-" or result["multi_label"] or result["errors"] == result["rows"]:
        return (done,)
    return (done, "aisle", "review", out, *columns, "-o", "to_label.csv")


def _refuse_only_errors(result: dict[str, Any], source: str, out: Path) -> None:
    """Let the exit code tell that no row has an answer.

    Raises:
        InputError: every row is an error.
    """
    if result["rows"] and result["errors"] == result["rows"]:
        why = "" if out.suffix == ".npy" else f"; the column error of {out} says why"
        raise InputError(f"no row of {source} has an answer{why}")


@app.command()
@reads_tables
def demo(
    data: Annotated[
        Path | None,
        data_argument("A file of texts to classify.", "twelve titles"),
    ] = None,
    repository: Repository = Path("model_repository"),
    rows: Annotated[
        int, typer.Option(min=500, help="Titles of the catalogue to train on; fewer take less time and classify worse.")
    ] = 16000,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline on the synthetic sample: train, build, serve, classify. Nothing is left running."""
    from aisle.pipelines.demo import TEXTS
    from aisle.pipelines.demo import demo as run

    with resumable():
        result = run(Path("work"), repository, data or TEXTS, rows)
    others = () if repository == Path("model_repository") else ("--repository", repository)
    report(result, as_json, _show_demo, (f"version {result['version']} in {repository}", "aisle", "serve", *others))


def _after_stop(out: Path, since: str | None) -> str:
    """Return what the same command does after a stop."""
    if not is_database(out):
        return "to resume"
    return "to go on after the last rows that were written" if since else "to start again; nothing was written"


FILE_ONLY = ("text_column", "delimiter", "encoding", "header", "bom", "shard", "taxonomy", "key", "since")


def is_file(text: str) -> bool:
    """Return whether a text is the name of a file or of a database's table. A text that cannot be a name is not."""
    try:
        return Path(text).is_file() or is_database(text)
    except (OSError, ValueError):
        return False


def _show_predictions(result: dict[str, Any]) -> None:
    decided = "decision" in result["predictions"][0]
    attributes = list(result["predictions"][0].get("attributes", ()))
    table = new_table("text", "category", "confidence", *(("decision", "decided") if decided else ()), *attributes)
    for row in result["predictions"]:
        if not row["categories"]:
            table.add_row(cell(row["text"]), "none reaches its threshold", "")
        further = [cell(row["decision"]), cell(row["decided"] or None)] if decided else []
        for name in attributes:
            each = row["attributes"].get(name)  # during a canary, another version may answer
            further.append(cell(each and f"{each['value']} ({each['confidence']:.4f})"))
        for rank, (category, confidence) in enumerate(zip(row["categories"], row["confidences"], strict=True)):
            first = [cell(row["text"]), *further] if not rank else [cell("")] * (1 + len(further))
            table.add_row(first[0], cell(category), f"{confidence:.4f}", *first[1:])
    stdout.print(table)


def _show_demo(result: dict[str, Any]) -> None:
    table = new_table("text", "category", "confidence", "latency", title="a model trained on a SYNTHETIC catalogue")
    for row in result["predictions"]:
        if "error" in row:
            table.add_row(cell(row["text"]), cell(f"refused: {row['error']}"))
            continue
        figures = f"{row['confidence']:.4f}", f"{row['milliseconds']:.1f} ms"
        table.add_row(cell(row["text"]), cell(row["category"]), *figures)
    stdout.print(table)
