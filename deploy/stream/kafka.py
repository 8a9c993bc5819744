"""The transport for Kafka, by librdkafka: static membership, cooperative rebalancing, transactions.

Outputs and offsets are committed in one transaction, under the generation of the group (KIP-447): a worker that has
lost its partitions without noticing cannot commit. Source:
https://cwiki.apache.org/confluence/display/KAFKA/KIP-447%3A+Producer+scalability+for+exactly+once+semantics
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka import Message as KafkaMessage

from aisle.console import say
from aisle.deploy.stream.faults import ended, error_of, remedied, unreachable
from aisle.deploy.stream.figures import Figures
from aisle.deploy.stream.settings import KafkaOptions
from aisle.deploy.stream.transport import DEAD_LETTER, SIZE, Message, Output
from aisle.errors import InputError

START_SECONDS = 10.0  # for each request at the start
CALL_SECONDS = 1.0  # of a call of the library that is repeated until it is done
STOP_CALLS = 10  # calls that a stop waits for
LINGER_SECONDS = 0.2  # how long a batch waits for more messages after its first
POLL_SECONDS = 0.1
LONGEST_BACKOFF = 8.0  # seconds

T = TypeVar("T")
_SILENT = logging.getLogger("aisle.stream.librdkafka")  # its errors come to `_note_error`
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


class KafkaTransport:
    """Reads one topic, and writes two."""

    def __init__(self, options: KafkaOptions, figures: Figures, stopping: threading.Event) -> None:
        """Connect, and join the group.

        Raises:
            InputError: no broker answers, a topic does not exist, rights are missing, or a property is wrong.
        """
        self._options, self._figures, self._stopping = options, figures, stopping
        self._claims: dict[int, int] = {}  # of the partitions of this worker
        self._numbers = itertools.count(1)  # for claims
        self._next: dict[int, int] = {}  # the first offset that is not committed, by partition
        self._ahead: deque[Message] = deque()  # read, but not taken
        self._joined = self._paused = self._away = False
        self._last_error: KafkaError | None = None
        self._undelivered: KafkaError | None = None
        try:
            self._consumer = Consumer(options.consumer(), error_cb=self._note_error, logger=_SILENT)
            self._check_topics()
            self._producer = self._new_producer()
        except KafkaException as failure:
            raise unreachable(error_of(failure), self._last_error, options) from None
        self._join()

    def take(self, most: int) -> list[Message]:
        if self._paused:
            self._consumer.resume(self._consumer.assignment())
            self._paused = False
        self._figures.lag(self._lag())
        taken: list[Message] = []
        end = time.monotonic() + 1.0
        while len(taken) < most and not self._stopping.is_set() and (left := end - time.monotonic()) > 0:
            if not self._ahead:
                self._read(min(left, POLL_SECONDS))
            elif self._owns(message := self._ahead.popleft()):
                if not taken:
                    end = time.monotonic() + LINGER_SECONDS
                taken.append(message)
        return [message for message in taken if self._owns(message)]

    def poll(self) -> None:
        self._read(0)

    def pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._stopping.is_set() and (left := end - time.monotonic()) > 0:
            self._consumer.pause(self._consumer.assignment())  # each time: partitions may have been added
            self._paused = True
            self._read(min(left, POLL_SECONDS))

    def commit(self, outputs: Sequence[Output]) -> list[Output]:
        """As `Transport.commit`. It tries until it is done or a stop is asked for.

        Raises:
            InputError: rights are missing, or a topic is gone.
            ServerError: another worker has the same name.
        """
        for attempt in itertools.count():
            mine = [output for output in outputs if self._owns(output.message)]
            if not mine:
                break
            try:
                written = self._write(mine)
            except KafkaException as failure:
                self._figures.transaction("aborted")
                if self._stopping.is_set():  # the next start with this name ends the transaction, or finds it done
                    break
                self._recover(error_of(failure), attempt)
            else:
                self._figures.transaction("committed")
                return written
        return []

    def close(self) -> None:
        self._consumer.close()

    # Reading

    def _join(self) -> None:
        """Join the group, so that missing rights are told at the start."""
        self._consumer.subscribe([self._options.source], self._assigned, self._revoked, self._revoked)
        end = time.monotonic() + START_SECONDS
        while not self._joined and not self._stopping.is_set() and time.monotonic() < end:
            self._read(POLL_SECONDS)

    def _read(self, seconds: float) -> None:
        """Wait for a message, and keep it in `_ahead`; here the library calls back for rebalances."""
        found = self._consumer.poll(seconds)
        if found is None:
            return
        if error := found.error():
            self._note_error(error)
            if known := ended(error, self._options) or remedied(error, self._options):
                raise known
            return
        self._away = False
        message = self._message(found)
        if message.partition in self._claims:
            self._next.setdefault(message.partition, message.offset)
            self._ahead.append(message)

    def _message(self, found: KafkaMessage) -> Message:
        partition = int(found.partition() or 0)
        claim = self._claims.get(partition, 0)
        headers: Any = tuple(found.headers() or ())
        key, value = _bytes(found.key()), _bytes(found.value())
        return Message(key, value, headers, self._options.source, partition, int(found.offset() or 0), claim)

    def _owns(self, message: Message) -> bool:
        return self._claims.get(message.partition) == message.claim

    def _assigned(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        self._joined = True
        for each in partitions:
            self._claims[each.partition] = next(self._numbers)

    def _revoked(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        """Forget partitions that another worker gets, or has already: it answers what is not committed."""
        for each in partitions:
            self._claims.pop(each.partition, None)
            self._next.pop(each.partition, None)
        self._ahead = deque(filter(self._owns, self._ahead))

    def _lag(self) -> dict[int, int]:
        """Return the number of messages that are not done, by partition of this worker."""
        found = {}
        for partition in self._claims:
            _, high = self._consumer.get_watermark_offsets(self._at(partition), cached=True) or (0, -1)
            if high >= 0 and partition in self._next:
                found[partition] = max(0, high - self._next[partition])
        return found

    # Writing

    def _new_producer(self) -> Producer:
        """Return a producer, after the broker has ended the transaction of an earlier one with this name."""
        producer = Producer(self._options.producer(), error_cb=self._note_error, logger=_SILENT)
        producer.init_transactions(START_SECONDS)
        return producer

    def _write(self, outputs: Sequence[Output]) -> list[Output]:
        """Write outputs and offsets in one transaction, and return what was written."""
        self._undelivered = None
        self._producer.begin_transaction()
        written = [self._produce(output) for output in outputs]
        done = {**self._next, **{each.message.partition: each.message.offset + 1 for each in outputs}}
        offsets = [self._at(partition, done[partition]) for partition in {each.message.partition for each in outputs}]
        group = self._consumer.consumer_group_metadata()
        self._producer.send_offsets_to_transaction(offsets, group, START_SECONDS)
        self._patiently(lambda: self._producer.commit_transaction(CALL_SECONDS))
        self._next = done
        return written

    def _produce(self, output: Output) -> Output:
        """Write an output. One that is too large becomes a dead letter without a value, or without key and headers."""
        *larger, bare = _ever_smaller(output, self._options.dead_letters)
        for each in larger:
            try:
                return self._send(each)
            except KafkaException as failure:
                if error_of(failure).code() != KafkaError.MSG_SIZE_TOO_LARGE:
                    raise
        return self._send(bare)

    def _send(self, output: Output) -> Output:
        headers: Any = [*output.headers]
        where = {"key": output.message.key, "headers": headers, "on_delivery": self._note_delivery}
        self._producer.produce(output.topic, output.value, **where)
        return output

    def _patiently(self, call: Callable[[], T]) -> T:
        """Repeat a call of a transaction while the broker is away; the library goes on where it was."""
        for calls in itertools.count(1):
            try:
                return call()
            except KafkaException as failure:
                error = error_of(failure)
                given_up = self._stopping.is_set() and calls >= STOP_CALLS
                if given_up or not error.retriable() or error.txn_requires_abort() or error.fatal():
                    raise
        raise AssertionError

    def _recover(self, error: KafkaError, attempt: int) -> None:
        """Undo a transaction that failed, and wait a little before the next attempt.

        If the library cannot undo it, nobody knows whether it was committed. Then a new producer ends it either way,
        and the messages are read again from the offsets that are committed.

        Raises:
            InputError: another attempt would fail as well.
        """
        for each in (self._undelivered, error):
            if each is not None and (known := remedied(each, self._options)):
                raise known
        say(f"a transaction failed and is repeated: {error.str()}")
        try:
            if error.txn_requires_abort() or error.retriable():
                self._patiently(lambda: self._producer.abort_transaction(CALL_SECONDS))
            else:
                self._producer = self._new_producer()
                self._read_again()
        except KafkaException as failure:
            if known := remedied(error_of(failure), self._options):
                raise known from None
        self.pause(random.uniform(0, min(LONGEST_BACKOFF, 0.2 * 2 ** min(attempt, 10))))

    def _read_again(self) -> None:
        """Give the partitions up and take them again, so that reading starts where the group's offsets are."""
        partitions = [self._at(partition) for partition in self._claims]
        self._revoked(self._consumer, partitions)
        self._consumer.incremental_unassign(partitions)
        self._consumer.incremental_assign(partitions)
        self._assigned(self._consumer, partitions)

    # Errors

    def _note_delivery(self, error: KafkaError | None, _: KafkaMessage) -> None:
        if error is not None and self._undelivered is None:
            self._undelivered = error

    def _note_error(self, error: KafkaError) -> None:
        """Keep the reason of a failed connection. The library connects again by itself."""
        if error.code() != KafkaError._ALL_BROKERS_DOWN:
            self._last_error = error
        elif self._claims and not self._away:
            self._away = True
            say(f"no broker answers at {self._options.brokers}; waiting for one")

    def _check_topics(self) -> None:
        """Check that the topics exist.

        Raises:
            InputError: one does not, or may not be read.
            KafkaException: no broker answers.
        """
        for topic in (self._options.source, self._options.target, self._options.dead_letters):
            found = self._topic(topic)
            if found.error is None and found.partitions:
                continue
            known = found.error and remedied(found.error, self._options)
            missing = found.error is None or found.error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART
            if known and not missing:
                raise known
            raise InputError(f"{self._options.brokers} has no topic {topic}; create it, or give another name")

    def _topic(self, name: str) -> Any:
        """Return the metadata of a topic."""
        try:
            return self._consumer.list_topics(name, timeout=START_SECONDS).topics[name]
        except KafkaException:
            self._consumer.poll(0)  # gives the reason to `_note_error`
            raise

    def _at(self, partition: int, offset: int = -1001) -> TopicPartition:
        return TopicPartition(self._options.source, partition, offset)


def _ever_smaller(output: Output, dead_letters: str) -> list[Output]:
    """Return an output, the same as a dead letter without a value, and one without key and headers too."""
    size = (SIZE, str(len(output.value or b"")).encode())
    empty = replace(output, topic=dead_letters, value=None, result=DEAD_LETTER, added=(*output.added, size))
    return [output, empty, replace(empty, message=replace(output.message, key=None, headers=()))]


def _bytes(value: Any) -> bytes | None:
    return value.encode() if isinstance(value, str) else value
