"""What a stream needs of a message broker. Another broker is one more class with these methods, like `kafka.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Headers = tuple[tuple[str, bytes | None], ...]
OWN = "aisle."  # start of the names of our own headers
SOURCE = "aisle.source"  # topic/partition/offset of the message
REASON = "aisle.reason"  # of a dead letter
SIZE = "aisle.size"  # bytes of a value that is left out, because it is over message.max.bytes
CLASSIFIED, PASSED_ON, DEAD_LETTER = "classified", "passed_on", "dead_letter"


@dataclass(frozen=True)
class Message:
    """One message that was read."""

    key: bytes | None
    value: bytes | None
    headers: Headers
    topic: str
    partition: int
    offset: int
    claim: int = 0  # of the partition; another number means that it was given away in between


@dataclass(frozen=True)
class Output:
    """A message to write. It has the key of the message that it answers."""

    message: Message  # what it answers
    topic: str
    value: bytes | None
    result: str
    added: Headers = ()
    version: int | None = None  # of the model that answered

    @property
    def headers(self) -> Headers:
        """Those of the message, where it came from, and those that are added."""
        kept = (pair for pair in self.message.headers if not pair[0].startswith(OWN))
        source = f"{self.message.topic}/{self.message.partition}/{self.message.offset}".encode()
        return (*kept, (SOURCE, source), *self.added)


class Transport(Protocol):
    """Reads messages and writes outputs. It has one thread, and every method returns soon after a stop is asked for."""

    def take(self, most: int) -> list[Message]:
        """Return up to `most` messages, in the order of their partitions; after a short wait, those that there are."""

    def poll(self) -> None:
        """Stay a member of the group during long work."""

    def pause(self, seconds: float) -> None:
        """Read nothing for so long, but stay a member of the group. The next `take` reads on."""

    def commit(self, outputs: Sequence[Output]) -> list[Output]:
        """Write outputs, and that their messages are done, in one transaction. Return those that were written.

        Messages whose partition another worker has taken over are left out, because that worker answers them.
        """

    def close(self) -> None:
        """Leave without writing anything."""
