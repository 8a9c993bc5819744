"""Two brokers that speak Kafka's protocol. Neither is Kafka itself.

`mock_cluster` is librdkafka's own, in this process: it can be told to fail. `Broker` is noida-db, a process that can be
killed, and that hides the messages of aborted transactions.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import confluent_kafka
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka import Message as KafkaMessage
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from aisle.deploy.server.triton import free_ports

from .conftest import wait_for

LATENCY = 0.05  # seconds of an answer through the proxy
Row = tuple[bytes | None, bytes | None]  # key, value


class Topics:
    """What a test does with the topics of a broker."""

    address = ""

    def write(self, topic: str, rows: Sequence[Row]) -> None:
        producer = Producer({"bootstrap.servers": self.address, "partitioner": "murmur2_random"})
        for key, value in rows:
            producer.produce(topic, value, key)
        assert producer.flush(30) == 0

    def read(self, topic: str, least: int, seconds: float = 60) -> list[KafkaMessage]:
        """Return what a reader of committed messages sees, as soon as there are so many; then what comes in 0.5 s."""
        settings = {"bootstrap.servers": self.address, "group.id": "reader", "isolation.level": "read_committed"}
        consumer = Consumer(settings)
        partitions = consumer.list_topics(topic, timeout=30).topics[topic].partitions
        consumer.assign([TopicPartition(topic, each, OFFSET_BEGINNING) for each in partitions])
        found: list[KafkaMessage] = []
        end = time.monotonic() + seconds
        while len(found) < least and time.monotonic() < end:
            found += [each for each in consumer.consume(10000, 0.1) if not each.error()]
        found += [each for each in consumer.consume(10000, 0.5) if not each.error()]
        consumer.close()
        return found


class Mock(Topics):
    """librdkafka's mock cluster of one broker."""

    def __init__(self, library: ctypes.CDLL, cluster: ctypes.c_void_p) -> None:
        self._library, self._cluster = library, cluster
        self.address = library.rd_kafka_mock_cluster_bootstraps(cluster).decode()

    def create(self, topic: str, partitions: int = 2) -> None:
        assert not self._library.rd_kafka_mock_topic_create(self._cluster, topic.encode(), partitions, 1)

    def fail(self, request: int, *errors: int) -> None:
        """Answer the next requests of a kind, by its number in Kafka's protocol, with errors."""
        numbers = (ctypes.c_int * len(errors))(*errors)
        self._library.rd_kafka_mock_push_request_errors_array(
            self._cluster, ctypes.c_int16(request), ctypes.c_size_t(len(errors)), numbers
        )


@contextmanager
def mock_cluster() -> Iterator[Mock]:
    (path,) = (Path(confluent_kafka.__file__).parent.parent / "confluent_kafka.libs").glob("librdkafka-*")
    library = ctypes.CDLL(str(path))
    for name in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_mock_cluster_new"):
        getattr(library, name).restype = ctypes.c_void_p
    library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    reason = ctypes.create_string_buffer(512)
    handle = ctypes.c_void_p(library.rd_kafka_new(0, ctypes.c_void_p(library.rd_kafka_conf_new()), reason, 512))
    cluster = ctypes.c_void_p(library.rd_kafka_mock_cluster_new(handle, 1))
    library.rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, ctypes.c_int32(0))
    yield Mock(library, cluster)
    library.rd_kafka_mock_cluster_destroy(cluster)
    library.rd_kafka_destroy(handle)


class Broker(Topics):
    """noida-db's Kafka, with its data in a folder."""

    def __init__(self, folder: Path) -> None:
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        self._command = [str(Path(sys.executable).parent / "noida-db"), "start", "--data-dir", str(folder / "data")]
        self._command += ["--only", "kafka", "--kafka-port", str(port)]
        self._log = folder / "broker.log"
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)
        wait_for(self._answers, 30)

    def _answers(self) -> bool:
        try:
            AdminClient({"bootstrap.servers": self.address, "log_level": 0}).list_topics(timeout=1)
        except KafkaException:
            return False
        return True

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait()

    def create(self, *topics: str, partitions: int = 4) -> None:
        admin: Any = AdminClient({"bootstrap.servers": self.address})
        for future in admin.create_topics([NewTopic(topic, partitions, 1) for topic in topics]).values():
            future.result()


class Proxy:
    """Stands before a broker on a port of its own, and can be away. It writes its port into the broker's answers.

    With a certificate it speaks TLS. Each answer takes a moment, as over a network: noida-db may forget the answer to a
    member that joins a group if another one joins again at once.
    """

    def __init__(self, broker: str, tls: ssl.SSLContext | None = None) -> None:
        host, _, port = broker.partition(":")
        self._broker, self._tls = (host, int(port)), tls
        self._open: set[socket.socket] = set()
        (self._port,) = free_ports(1)
        self.address = f"{host}:{self._port}"
        self._swap = (host.encode() + int(port).to_bytes(4), host.encode() + self._port.to_bytes(4))
        self.come()

    def come(self) -> None:
        self._listener = socket.create_server((self._broker[0], self._port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def go(self) -> None:
        """Refuse connections, and cut those that are open."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in [*self._open]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with suppress(OSError, struct.error), socket.create_connection(self._broker) as server:
            client = self._tls.wrap_socket(plain, server_side=True) if self._tls else plain
            self._open |= {client, server}
            with client:
                while self._forward(client, server):
                    pass

    def _forward(self, client: socket.socket, server: socket.socket) -> bool:
        """Pass on what comes next from either side; return whether both are still there."""
        decrypted = isinstance(client, ssl.SSLSocket) and client.pending()
        ready = [client] if decrypted else select.select([client, server], [], [])[0]
        if client in ready:
            server.sendall(data := client.recv(65536))
            return bool(data)
        (size,) = struct.unpack(">i", _exactly(server, 4))
        answer = _exactly(server, size).replace(*self._swap)
        time.sleep(LATENCY)
        client.sendall(struct.pack(">i", size) + answer)
        return True


def _exactly(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = source.recv(size - len(data))
        if not more:
            raise OSError("closed")
        data += more
    return data
