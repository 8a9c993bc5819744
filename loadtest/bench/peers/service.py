"""A plain FastAPI service around a function of texts. Requests that wait while it is busy form the next batch."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

Predict = Callable[[list[str]], list[str]]


class Request(BaseModel):
    text: str


def serve(predict: Predict, port: int, settings: dict[str, Any]) -> None:
    """Serve until stopped. Settings: `batch`, the largest batch size, and `workers`, the number of threads."""
    app = FastAPI()
    waiting: queue.SimpleQueue[tuple[str, asyncio.Future[str], asyncio.AbstractEventLoop]] = queue.SimpleQueue()

    @app.post("/classify")
    async def classify(request: Request) -> dict[str, str]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str] = loop.create_future()
        waiting.put((request.text, answer, loop))
        return {"category": await answer}

    @app.get("/health")
    def health() -> None:
        pass

    def work() -> None:
        while True:
            batch = [waiting.get()]
            while len(batch) < settings["batch"] and not waiting.empty():
                try:
                    batch.append(waiting.get_nowait())
                except queue.Empty:  # another worker took it
                    break
            categories = predict([text for text, _, _ in batch])
            for (_, answer, loop), category in zip(batch, categories, strict=True):
                loop.call_soon_threadsafe(_answer, answer, category)

    predict(["warm-up", "a longer text to warm up with"])
    for _ in range(settings["workers"]):
        threading.Thread(target=work, daemon=True).start()
    uvicorn.run(app, port=port, log_level="warning", access_log=False)


def _answer(answer: asyncio.Future[str], category: str) -> None:
    if not answer.done():  # its caller may have disconnected
        answer.set_result(category)
