"""Messages in Avro whose schemas are in a registry, as Confluent frames them: a zero byte, the schema's id, the value.

Source: https://docs.confluent.io/platform/current/schema-registry/fundamentals/serdes-develop/index.html#wire-format
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import httpx
from confluent_kafka.schema_registry import SchemaRegistryClient, SchemaRegistryError
from confluent_kafka.schema_registry.avro import AvroDeserializer
from confluent_kafka.serialization import MessageField, SerializationContext

from aisle.client import Failure
from aisle.deploy.stream.settings import REGISTRY, Properties
from aisle.errors import InputError, ServerError

FRAME = 5  # bytes before the value
NOT_FOUND = 404
SECONDS = 10  # for a request to the registry
# Properties that the client wants as numbers. A password of digits stays a text.
NUMBERS = "timeout", "cache.capacity", "cache.latest.ttl.sec", "max.retries", "retries.wait.ms", "retries.max.wait.ms"


class AvroDecoder:
    """Decodes messages with the schema that each names. The library keeps the schemas."""

    def __init__(self, registry: Properties, topic: str) -> None:
        """Prepare the registry's client. It connects when the first message comes.

        Raises:
            InputError: a property is missing or wrong.
        """
        if "url" not in registry:
            raise InputError(f"Avro needs the line {REGISTRY}url=https://HOST:PORT in --config FILE")
        self._where = urlsplit(registry["url"]).netloc.rpartition("@")[2]
        numbers = {name: int(registry[name]) for name in NUMBERS if str(registry.get(name, "")).isdigit()}
        try:
            self._decode = AvroDeserializer(SchemaRegistryClient({"timeout": SECONDS, **registry, **numbers}))
        except (ValueError, TypeError, OSError) as error:
            raise InputError(f"--config: one of the lines {REGISTRY}… is wrong: {error}") from None
        self._context = SerializationContext(topic, MessageField.VALUE)

    def __call__(self, raw: bytes) -> Any:
        """Return the value of a message, or a `Failure` if it is not one of the registry's.

        Raises:
            ServerError: the registry cannot be asked. Nothing is lost: the next start reads the message again.
        """
        if len(raw) < FRAME or raw[0] != 0:
            return Failure("the message is not Avro with the id of a schema")
        try:
            return self._decode(raw, self._context)
        except SchemaRegistryError as error:
            if error.http_status_code == NOT_FOUND:
                return Failure(f"the registry has no schema {int.from_bytes(raw[1:FRAME])}")
            status = f"{error.http_status_code} {error.error_message}"
            raise ServerError(f"the schema registry at {self._where} answered {status}") from None
        except (httpx.HTTPError, OSError) as error:
            raise ServerError(f"the schema registry at {self._where} cannot be reached: {error}") from None
        except Exception as error:  # Avro's library raises its own, and those of the bytes that are missing
            return Failure(f"the message is not of its schema: {error}"[:200])
