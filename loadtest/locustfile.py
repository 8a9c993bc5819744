"""A Locust user that calls the server as a service would: one text a request, over one gRPC channel.

gRPC's own gevent support turns its blocking calls into cooperative ones, so that one process runs many users.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

import grpc.experimental.gevent as grpc_gevent
from locust import User, constant, events, task

from aisle.client import Classifier
from aisle.preprocess.clean import TextError, prepare
from aisle.preprocess.table import read_labelled

grpc_gevent.init_gevent()

texts: list[str] = []
following = itertools.count()


def read_texts(**_: Any) -> None:
    """Take the texts of AISLE_DATA that can be classified, in the file's order."""
    column = os.environ.get("AISLE_TEXT_COLUMN", "text")
    for text, _label in read_labelled(Path(os.environ["AISLE_DATA"]), column, column):
        try:
            prepare(text)
        except TextError:
            continue
        texts.append(text or "")


events.test_start.add_listener(read_texts)  # type: ignore[no-untyped-call]


class Service(User):
    """Sends its next text as soon as the last one is answered (a closed loop)."""

    wait_time = constant(0)

    def on_start(self) -> None:
        self.classifier = Classifier.from_environment(self.host or "localhost:8001")

    def on_stop(self) -> None:
        self.classifier.close()

    @task
    def classify(self) -> None:
        text = texts[next(following) % len(texts)]
        start = time.perf_counter()
        error: Exception | None = None
        try:
            self.classifier.classify([text])
        except Exception as caught:
            error = caught
        self.environment.events.request.fire(
            request_type="grpc",
            name="classify",
            response_time=(time.perf_counter() - start) * 1e3,
            response_length=0,
            exception=error,
            context={},
        )
