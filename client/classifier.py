"""The blocking client."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import cached_property
from typing import Any, Self

from tritonclient.grpc import InferenceServerClient, InferenceServerException

from aisle.client.protocol import (
    IN_FLIGHT,
    MISSING,
    MODEL,
    Connection,
    Failure,
    InvalidText,
    Prediction,
    Text,
    inputs,
    predictions,
)
from aisle.client.tracing import request_span

Answers = list[Prediction | Failure]


class Classifier(Connection):
    """Classifies product texts on an Aisle server. One instance may be shared by threads.

    with Classifier("localhost:8001") as classifier:
        for prediction in classifier.classify(["蓝牙耳机 降噪", "usb c cable 2m"]):
            print(prediction.category, prediction.confidence)
    """

    _transport = InferenceServerClient

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(8 * IN_FLIGHT, "aisle-client")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def classify(self, texts: Sequence[Text], top_k: int = 1) -> list[Prediction]:
        """Return the predictions of `texts`, in their order. Long lists travel as several requests at once.

        Raises:
            InvalidText: a text cannot be classified, or `top_k` is out of range.
            Unavailable: no server answered.
            Overloaded: too many requests are waiting there; only `stream` asks again of itself.
            ClassifierError: the server failed, or took longer than the timeout.
        """
        batches = list(_chunks(texts, self.max_batch))
        if len(batches) == 1:  # in the caller's own thread: as many at once as there are callers
            return self._request(batches[0], top_k)
        return list(itertools.chain.from_iterable(self._pipeline(batches, top_k, self._request)))

    def stream(self, texts: Iterable[Text | None], top_k: int = 1) -> Iterator[Prediction | Failure]:
        """Yield an answer for each of any number of texts, in their order and in constant memory.

        A text that the server refuses gets a `Failure`; the others of its batch are classified all the same.

        Raises:
            Unavailable, Overloaded, ClassifierError: as `classify`, but only after trying for longer.
        """
        for batch in self._pipeline(_chunks(texts, self._ask_max_batch(patient=True)), top_k, self._request_each):
            yield from batch

    def probe(self, top_k: int = 1, *, patient: bool = False) -> None:
        """Ask what leaves no trace in the log: raises as `classify` does, InvalidText if there are fewer categories.

        Args:
            patient: wait for a server as `stream` does.
        """
        self._ask(["probe"], top_k, patient)

    @property
    def max_batch(self) -> int:
        """How many texts the server takes in one request."""
        return self._ask_max_batch()

    def _ask_max_batch(self, patient: bool = False) -> int:
        if self._max_batch is None:
            config = self._retrying(lambda: self._client.get_model_config(MODEL, self._version), patient)
            self._max_batch = max(1, config.config.max_batch_size)
        return self._max_batch

    def _pipeline(self, batches: Iterable[list[Any]], top_k: int, request: Any) -> Iterator[Any]:
        """Yield the answers of the batches in order, with up to IN_FLIGHT requests under way."""
        pending: deque[Future[Any]] = deque()
        try:
            for batch in batches:
                context = copy_context()  # of the caller: its trace goes on in the thread
                pending.append(self._threads.submit(context.run, request, batch, top_k))
                if len(pending) == IN_FLIGHT:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _request(self, texts: list[Text], top_k: int, patient: bool = False) -> list[Prediction]:
        answers = self._ask(texts, top_k, patient)
        if self._log:
            self._log.record(texts, answers)
        return answers

    def _ask(self, texts: list[Text], top_k: int, patient: bool) -> list[Prediction]:
        tensors = inputs(texts, top_k)
        with request_span(len(texts)) as headers:
            answer = self._retrying(
                lambda: self._client.infer(
                    MODEL,
                    tensors,
                    self._version,
                    headers=headers,
                    **self._limits(patient),
                ),
                patient,
            )
        return predictions(answer)

    def _request_each(self, texts: list[Text | None], top_k: int) -> Answers:
        """Classify a batch in which texts may be missing or bad."""
        answers = iter(self._halving([text for text in texts if text is not None], top_k))
        return [MISSING if text is None else next(answers) for text in texts]

    def _halving(self, texts: list[Text], top_k: int) -> Answers:
        """Classify a batch; where it is refused, halve it until each bad text stands alone."""
        if not texts:
            return []
        try:
            return [*self._request(texts, top_k, patient=True)]
        except InvalidText as error:
            if len(texts) == 1:
                return [Failure(str(error))]
        middle = len(texts) // 2
        return self._halving(texts[:middle], top_k) + self._halving(texts[middle:], top_k)

    def _retrying(self, call: Any, patient: bool = False) -> Any:
        for attempt in itertools.count():
            try:
                return call()
            except InferenceServerException as error:
                seconds = self._seconds_to_wait(error, attempt, patient)
            time.sleep(seconds)


def _chunks(texts: Iterable[Any], size: int) -> Iterator[list[Any]]:
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, size)):
        yield chunk
