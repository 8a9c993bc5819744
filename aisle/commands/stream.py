"""Streams: classify the messages of a topic."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Any

import typer

from aisle.commands import Json, Url, report
from aisle.commands.command import Stage, among, file_to_read
from aisle.console import show
from aisle.errors import InputError

app = Stage()


def formats() -> list[str]:
    """Return the names of all formats."""
    from aisle.deploy.stream.formats import FORMATS

    return list(FORMATS)


@app.command()
def stream(
    source: Annotated[str, typer.Argument(metavar="FROM", help="The topic to read.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The topic to write.")],
    text: Annotated[
        list[str],
        typer.Option(metavar="PATH", help="Where the text is, as $.product.title; title=$.name for a field."),
    ],
    dead_letters: Annotated[
        str, typer.Option(help="The topic for messages that cannot be classified.", show_default="TO.dead-letters")
    ] = "",
    brokers: Annotated[
        str | None, typer.Option(help="HOST:PORT of brokers.", show_default="those of --config, or localhost:9092")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=file_to_read, help="Lines key=value for librdkafka, such as SASL and TLS, and the schema registry."
        ),
    ] = None,
    group: Annotated[str, typer.Option(help="The consumer group. Its workers share the partitions.")] = "aisle",
    instance: Annotated[
        str | None,
        typer.Option(help="This worker's name in the group; no other has it.", show_default="the host's name"),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format", callback=among(formats), autocompletion=formats, help="json, avro, debezium or debezium-avro."
        ),
    ] = "json",
    url: Url = "localhost:8001",
    timeout: Annotated[float, typer.Option(min=0.001, help="Time limit of a request, in seconds.")] = 10.0,
    metrics_host: Annotated[str, typer.Option(help="Address of the metrics; 0.0.0.0 for all.")] = "127.0.0.1",
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the metrics.")] = 8003,
    as_json: Json = False,
) -> None:
    """Classify the messages of a Kafka topic into another, each exactly once, until stopped.

    It reaches the server as the other commands do: TLS by AISLE_TLS_CA, a gateway by AISLE_TOKEN.
    """
    from aisle.deploy.stream.settings import KafkaOptions, read_properties, split_registry
    from aisle.deploy.stream.worker import StreamOptions, work

    dead_letters = dead_letters or f"{target}.dead-letters"
    if len({source, target, dead_letters}) < 3:
        raise InputError("FROM, TO and --dead-letters must be three different topics")
    for option, name in (("--group", group), ("--instance", instance), ("--brokers", brokers)):
        if name == "":
            raise InputError(f"{option} is empty; give a name, or leave it out")
    properties, registry = split_registry(read_properties(config, brokers))
    options = StreamOptions(
        KafkaOptions(source, target, dead_letters, group, instance or socket.gethostname(), properties),
        text,
        form,
        registry,
        url,
        timeout,
        (metrics_host, metrics_port),
    )
    report(work(options), as_json, _show)


def _show(result: dict[str, Any]) -> None:
    show(
        f"{result['messages']} messages: {result['classified']} classified, {result['passed_on']} passed on, "
        f"{result['dead_letters']} dead letters; {result['messages_per_second']} per second"
    )
