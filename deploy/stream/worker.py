"""One worker of a stream, from its start to its stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from aisle.client import Classifier
from aisle.console import say, track
from aisle.deploy.stream.asking import Asker
from aisle.deploy.stream.figures import Figures
from aisle.deploy.stream.formats import reader_of
from aisle.deploy.stream.kafka import KafkaTransport
from aisle.deploy.stream.paths import check_fields, parse_all
from aisle.deploy.stream.settings import KafkaOptions
from aisle.deploy.stream.stream import Route, run


@dataclass(frozen=True)
class StreamOptions:
    """What a worker needs."""

    kafka: KafkaOptions
    text: Sequence[str]  # paths
    format: str = "json"
    registry: dict[str, Any] = field(default_factory=dict)  # properties of the schema registry
    url: str = "localhost:8001"
    timeout: float = 10.0  # seconds
    metrics: tuple[str, int] = ("127.0.0.1", 8003)  # address and port


def work(options: StreamOptions) -> dict[str, Any]:
    """Classify messages until SIGTERM or Ctrl-C; return the counts. The messages in hand are completed first.

    Raises:
        InputError, ServerError: as `classify_topic`.
    """
    with _stopped_by_signals() as stopping:
        return classify_topic(options, stopping)


def classify_topic(options: StreamOptions, stopping: threading.Event) -> dict[str, Any]:
    """Classify messages until a stop is asked for; return the counts.

    Raises:
        InputError: an option is wrong, no broker answers, a topic is missing, or rights are.
        ServerError: no Triton answers at the start, another worker has the same name, or the schema registry is away.
    """
    kafka, figures, paths = options.kafka, Figures(), parse_all(options.text)
    reader = reader_of(options.format, options.registry, kafka.source)
    # Without retries of its own, because the stream pauses its partitions between two tries.
    with Classifier.from_environment(options.url, timeout=options.timeout, retries=0) as classifier:
        check_fields(paths, classifier.models().fields)
        classifier.probe()
        with closing(KafkaTransport(kafka, figures, stopping)) as transport, figures.served(options.metrics):
            say(f"reading {kafka.source} for {kafka.target} as {kafka.instance} of {kafka.group}")
            asker = Asker(classifier, transport, figures, stopping)
            route = Route(reader, paths, kafka.target, kafka.dead_letters)
            for output in track(run(transport, asker, route, stopping), "classifying"):
                figures.message(output)
    return figures.summary()


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and Ctrl-C set. A second signal ends the worker at once."""
    stopping = threading.Event()

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.default_int_handler)
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
