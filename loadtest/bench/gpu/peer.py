"""peer.py CHECKPOINT PORT: transformers behind HTTP. Requests that arrive during a batch form the next one."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import torch
from aiohttp import web
from transformers import AutoModelForSequenceClassification, AutoTokenizer

MAX_BATCH = 256


class Service:
    def __init__(self, checkpoint: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        model: Any = AutoModelForSequenceClassification.from_pretrained(checkpoint)
        self.model = model.eval().to(self.device, torch.float16)
        self.waiting: asyncio.Queue[tuple[str, asyncio.Future[int]]] = asyncio.Queue()

    def predict(self, texts: list[str]) -> list[int]:
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            best: list[int] = self.model(**inputs).logits.argmax(1).tolist()
        return best

    async def work(self, _: web.Application) -> Any:
        task = asyncio.create_task(self._batches())
        yield
        task.cancel()

    async def _batches(self) -> None:
        while True:
            batch = [await self.waiting.get()]
            while len(batch) < MAX_BATCH and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            best = await asyncio.to_thread(self.predict, [text for text, _ in batch])
            for (_, future), category in zip(batch, best, strict=True):
                if not future.done():
                    future.set_result(category)

    async def classify(self, request: web.Request) -> web.Response:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        await self.waiting.put(((await request.json())["text"], future))
        return web.json_response({"category": await future})


def main() -> None:
    service = Service(sys.argv[1])
    service.predict(["warm-up", "a longer text to warm up with"])
    app = web.Application()
    app.cleanup_ctx.append(service.work)

    async def ready(_: web.Request) -> web.Response:
        return web.json_response({})

    app.add_routes([web.post("/classify", service.classify), web.get("/ready", ready)])
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[2]), print=None, access_log=None)


if __name__ == "__main__":
    main()
