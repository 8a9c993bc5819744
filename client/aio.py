"""The asyncio client."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any, Self

from tritonclient.grpc import InferenceServerException
from tritonclient.grpc.aio import InferenceServerClient

from aisle.client.protocol import IN_FLIGHT, MODEL, Connection, Prediction, inputs, predictions
from aisle.client.tracing import request_span


class AsyncClassifier(Connection):
    """The asyncio twin of `Classifier`: the same arguments, results and errors."""

    _transport = InferenceServerClient

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.close()

    async def classify(self, texts: Sequence[str | bytes], top_k: int = 1) -> list[Prediction]:
        """Return the predictions of `texts`, in their order; see `Classifier.classify`."""
        size = await self.max_batch()
        in_flight = asyncio.Semaphore(IN_FLIGHT)

        async def request(batch: Sequence[str | bytes]) -> list[Prediction]:
            async with in_flight:
                return await self._request(batch, top_k)

        tasks = [asyncio.create_task(request(texts[i : i + size])) for i in range(0, len(texts), size)]
        try:
            batches = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
        return [prediction for batch in batches for prediction in batch]

    async def max_batch(self) -> int:
        """How many texts the server takes in one request."""
        if self._max_batch is None:
            config = await self._retrying(lambda: self._client.get_model_config(MODEL, self._version))
            self._max_batch = max(1, config.config.max_batch_size)
        return self._max_batch

    async def _request(self, texts: Sequence[str | bytes], top_k: int) -> list[Prediction]:
        tensors = inputs(texts, top_k)
        with request_span(len(texts)) as headers:
            result = await self._retrying(
                lambda: self._client.infer(
                    MODEL,
                    tensors,
                    self._version,
                    client_timeout=self._timeout,
                    timeout=self._queue_us,
                    headers=headers,
                )
            )
        answers = predictions(result)
        if self._log:
            self._log.record(texts, answers)
        return answers

    async def _retrying(self, call: Any) -> Any:
        for attempt in itertools.count():
            try:
                return await call()
            except InferenceServerException as error:
                seconds = self._seconds_to_wait(error, attempt)
            await asyncio.sleep(seconds)
