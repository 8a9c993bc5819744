"""Locust users that call the server with one text per call, and the shape of their load.

With gRPC's gevent support, one process runs thousands of concurrent calls over one channel, through Aisle's own client.
Every process of a distributed run reads the same environment variables: AISLE_DATA, AISLE_TEXT_COLUMN and AISLE_STEPS,
which holds `run.Steps` as a JSON object.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gevent
import grpc.experimental.gevent as grpc_gevent
from locust import LoadTestShape, User, constant, events, task
from locust.runners import WORKER_REPORT_INTERVAL, MasterRunner

from aisle.client import Classifier
from aisle.loadtest.locust.run import Steps, label
from aisle.loadtest.locust.zipf import zipf
from aisle.preprocess.clean import prepare
from aisle.preprocess.tables.table import read_labelled
from aisle.preprocess.values import TextError

grpc_gevent.init_gevent()

steps = Steps(**json.loads(os.environ["AISLE_STEPS"]))
WARM_UP = "warm-up"
counting = {"kind": "closed", "name": WARM_UP}  # the current load, and the name of its statistics


@cache
def texts() -> Iterator[str]:
    """Return the texts of AISLE_DATA that can be classified, endlessly: in random order, or as Zipf traffic."""
    column = os.environ.get("AISLE_TEXT_COLUMN", "text")
    found = []
    for text, _label in read_labelled(Path(os.environ["AISLE_DATA"]), column, column):
        try:
            prepare(text)
        except TextError:
            continue
        found.append(text or "")
    seed = os.getpid()  # differs between workers
    if steps.zipf is not None:
        return zipf(found, seed, steps.zipf)
    return itertools.cycle(random.Random(seed).sample(found, len(found)))


@cache
def classifier(host: str) -> Classifier:
    """Return the process's only client: all users share its channel."""
    return Classifier.from_environment(host, timeout=60.0)


class Caller(User):
    """A user. In a closed load, it sends its next text as soon as its last one is answered.

    In an open load, it makes one call per second on average, at random times, and does not wait for answers. The sum of
    independent Poisson processes is a Poisson process, so n users make n calls per second, on any number of workers.
    """

    wait_time = constant(0)
    due: float | None = None  # when its last call of an open load was due

    @task
    def classify(self) -> None:
        now = time.perf_counter()
        if counting["kind"] == "closed":
            self.send(now)
            return
        self.due = (self.due or now) + random.expovariate(1)
        gevent.sleep(max(0.0, self.due - now))
        gevent.spawn(self.send, self.due)

    def send(self, due: float) -> None:
        """Send a text and count the answer. Latency counts from the time when the call was due."""
        error: Exception | None = None
        try:
            classifier(self.host or "localhost:8001").classify([next(texts())])
        except Exception as caught:
            error = caught
        self.environment.events.request.fire(
            request_type="grpc",
            name=counting["name"],
            response_time=(time.perf_counter() - due) * 1e3,
            response_length=0,
            exception=error,
            context={},
        )


class Shape(LoadTestShape):
    """Runs the closed loads first, then the open loads, at shares of the best closed throughput."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.todo: list[tuple[str, int]] = [("closed", callers) for callers in steps.callers]
        self.step: tuple[str, int] = self.todo[0]
        self.over = 0.0

    def tick(self) -> Any:
        """Return the number of users and how many to start per second; None ends the test. Called every second."""
        if time.monotonic() >= self.over:
            if not self.todo and self.step == ("closed", steps.callers[-1]):
                self.todo = [("open", rate) for rate in self._rates()]
            if not self.todo:
                return None
            self.step = self.todo.pop(0)
            self._count_as(WARM_UP)
            # Timers, because ticks are too coarse.
            gevent.spawn_later(steps.warm_up, self._count_as, label(*self.step))
            gevent.spawn_later(steps.warm_up + steps.seconds, self._count_as, WARM_UP)
            self.over = time.monotonic() + steps.warm_up + steps.seconds
            if self.step == ("closed", steps.callers[-1]) and isinstance(self.runner, MasterRunner):
                self.over += WORKER_REPORT_INTERVAL + 1  # until all workers have reported
        return self.step[1], 1000

    def _rates(self) -> list[int]:
        counted = [self._runner.stats.get(label("closed", callers), "grpc").num_requests for callers in steps.callers]
        return sorted({max(1, round(max(counted) / steps.seconds * share)) for share in steps.shares})

    def _count_as(self, name: str) -> None:
        self._runner.send_message("count", {"kind": self.step[0], "name": name})

    @property
    def _runner(self) -> Any:
        return self.runner


def count(environment: Any, msg: Any, **_: Any) -> None:
    counting.update(msg.data)


def listen(environment: Any, **_: Any) -> None:
    texts()  # read the table before the load starts
    environment.runner.register_message("count", count)


events.init.add_listener(listen)  # type: ignore[no-untyped-call]
