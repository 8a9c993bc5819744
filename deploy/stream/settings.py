"""The settings of Kafka's library: our own, and those of `--config FILE`, such as SASL and TLS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aisle.errors import InputError

BROKERS = "localhost:9092"
TRANSACTION_MS = 30_000  # shorter than a session, so that a killed worker's transaction is over before others take on
# What a file may not change, and what to do instead.
OWN = {
    "group.id": "give --group",
    "group.instance.id": "give --instance",
    "transactional.id": "give --instance",
    "enable.auto.commit": "",
    "enable.auto.offset.store": "",
    "enable.idempotence": "",
    "isolation.level": "",
    "partition.assignment.strategy": "",
    "test.mock.num.brokers": "",
}
REGISTRY = "schema.registry."  # the beginning of a property of the schema registry
Properties = dict[str, Any]


@dataclass(frozen=True)
class KafkaOptions:
    """The topics, and who reads them."""

    source: str
    target: str
    dead_letters: str
    group: str
    instance: str  # the worker's name in the group: another than that of every other worker, and kept at a restart
    properties: Properties  # of both consumer and producer

    @property
    def brokers(self) -> str:
        return str(self.properties["bootstrap.servers"])

    def consumer(self) -> Properties:
        return {
            "auto.offset.reset": "earliest",
            **self.properties,
            "group.id": self.group,
            "group.instance.id": self.instance,
            "partition.assignment.strategy": "cooperative-sticky",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "isolation.level": "read_committed",
        }

    def producer(self) -> Properties:
        return {
            "transaction.timeout.ms": TRANSACTION_MS,
            "partitioner": "murmur2_random",  # as the Java clients: a key has the same partition whoever writes it
            **self.properties,
            "transactional.id": f"{self.group}-{self.instance}",
        }


def read_properties(file: Path | None, brokers: str | None) -> Properties:
    """Return the properties of a file of lines `key=value`, as librdkafka names them, and the brokers.

    Args:
        brokers: HOST:PORT, separated by commas; by default those of the file.

    Raises:
        InputError: a line has another form, or sets what the stream sets itself. No message shows a value.
    """
    found: Properties = {}
    for number, line in enumerate(_lines(file), start=1):
        key, equals, value = (part.strip() for part in line.partition("="))
        if not key or key.startswith("#"):
            continue
        if not equals:
            raise InputError(f"{file}: line {number} is not key=value")
        if key in OWN:
            raise InputError(
                f"{file}: line {number}: remove {key}, which the stream sets itself; {OWN[key]}".rstrip("; ")
            )
        found[key] = value
    if brokers is not None:
        found["bootstrap.servers"] = brokers
    return {"bootstrap.servers": BROKERS, **found}


def split_registry(properties: Properties) -> tuple[Properties, Properties]:
    """Return the properties of Kafka, and those of the schema registry without their prefix."""
    registry = {name.removeprefix(REGISTRY): value for name, value in properties.items() if name.startswith(REGISTRY)}
    return {name: value for name, value in properties.items() if not name.startswith(REGISTRY)}, registry


def _lines(file: Path | None) -> list[str]:
    try:
        return file.read_text("utf-8").splitlines() if file else []
    except UnicodeError:
        raise InputError(f"{file} is not UTF-8; give a file of lines key=value") from None
