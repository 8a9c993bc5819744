"""The metrics of a stream: for Prometheus while it runs, and in one object at its end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge

from aisle.deploy.stream.transport import CLASSIFIED, DEAD_LETTER, PASSED_ON, Output
from aisle.errors import InputError

DESCRIPTIONS = {
    "aisle_stream_messages_total": "Messages that are done, by result: classified, passed_on or dead_letter",
    "aisle_stream_refusals_total": "Requests that the server did not answer, by gRPC status; each is sent again",
    "aisle_stream_transactions_total": "Transactions, by result: committed or aborted",
    "aisle_stream_lag": "Messages that are not done, by partition of this worker",
    "aisle_stream_paused": "1 while the partitions are paused because the server does not answer, otherwise 0",
}


class Figures:
    """Counts what a stream does."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._messages = self._counter("aisle_stream_messages_total", "result")
        self._refusals = self._counter("aisle_stream_refusals_total", "status")
        self._transactions = self._counter("aisle_stream_transactions_total", "result")
        self._lag = Gauge("aisle_stream_lag", DESCRIPTIONS["aisle_stream_lag"], ["partition"], registry=self.registry)
        self._paused = Gauge("aisle_stream_paused", DESCRIPTIONS["aisle_stream_paused"], registry=self.registry)
        self._counts: dict[str, Counter[str]] = {
            "messages": Counter(),
            "refusals": Counter(),
            "transactions": Counter(),
        }
        self._versions: Counter[int] = Counter()
        self._partitions: set[int] = set()
        self._start = time.perf_counter()

    def _counter(self, name: str, label: str) -> prometheus_client.Counter:
        return prometheus_client.Counter(name, DESCRIPTIONS[name], [label], registry=self.registry)

    @contextmanager
    def served(self, address: tuple[str, int]) -> Iterator[None]:
        """Serve /metrics on a host and port within the context.

        Raises:
            InputError: the port cannot be bound.
        """
        host, port = address
        try:
            server, thread = prometheus_client.start_http_server(port, host, self.registry)
        except OSError as error:
            message = f"cannot serve metrics on {host}:{port}: {error.strerror}; choose another --metrics-port"
            raise InputError(message) from None
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def message(self, output: Output) -> None:
        self._messages.labels(output.result).inc()
        self._counts["messages"][output.result] += 1
        if output.version is not None:
            self._versions[output.version] += 1

    def refusal(self, status: str) -> None:
        self._refusals.labels(status).inc()
        self._counts["refusals"][status] += 1

    def transaction(self, result: str) -> None:
        self._transactions.labels(result).inc()
        self._counts["transactions"][result] += 1

    def lag(self, lag: Mapping[int, int]) -> None:
        """Set the lag of each partition; those of other workers go."""
        for gone in self._partitions - lag.keys():
            self._lag.remove(str(gone))
        for partition, messages in lag.items():
            self._lag.labels(str(partition)).set(messages)
        self._partitions = {*lag}

    def paused(self, paused: bool) -> None:
        self._paused.set(paused)

    def summary(self) -> dict[str, Any]:
        """Return all counts since the start, for `--json`."""
        seconds = time.perf_counter() - self._start
        messages, transactions = self._counts["messages"], self._counts["transactions"]
        return {
            "messages": messages.total(),
            "classified": messages[CLASSIFIED],
            "passed_on": messages[PASSED_ON],
            "dead_letters": messages[DEAD_LETTER],
            "refusals": dict(self._counts["refusals"]),
            "transactions": transactions["committed"],
            "aborted": transactions["aborted"],
            "versions": {str(version): count for version, count in sorted(self._versions.items())},
            "seconds": round(seconds, 3),
            "messages_per_second": round(messages.total() / seconds, 1),
        }
