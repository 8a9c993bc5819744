"""Try: one text, its categories, the decision, which words decided, and what was cut off."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from aisle.build.repository import versions
from aisle.client import Prediction
from aisle.deploy.desk.desk import Desk
from aisle.deploy.desk.guard import field, form
from aisle.preprocess.clean import prepare
from aisle.preprocess.encode import TextTokenizer

TOP_K = 5
SHADES = 4  # of each colour, for the words that decided
MOST_WORDS = 128  # leaving words out is one request for each


def routes(desk: Desk) -> APIRouter:
    router = APIRouter()
    explaining = asyncio.Lock()  # one text is explained at a time: it takes as many calls as the text has words

    @router.get("/")
    def show(request: Request) -> Response:
        return desk.render(request, "try.html")

    @router.post("/try")
    async def classify(request: Request) -> Response:
        text = field(await form(request), "text")
        values = await run_in_threadpool(_answer, desk, text)
        return desk.render(request, "_answer.html", **values)

    @router.post("/try/why")
    async def why(request: Request) -> Response:
        """Which words decided. This comes after the answer, because it takes longer."""
        text = field(await form(request), "text")
        async with explaining:
            if await request.is_disconnected():
                return Response(status_code=204)
            pieces = await run_in_threadpool(words_that_decided, desk, text)
        return desk.render(request, "_why.html", pieces=pieces)

    return router


def _answer(desk: Desk, text: str) -> dict[str, Any]:
    prepared = prepare(text)
    prediction = predict(desk, [text])[0]
    read, unread = _what_is_read(desk, prepared, prediction.version)
    return {"text": text, "prepared": prepared, "prediction": prediction, "read": read, "unread": unread}


def predict(desk: Desk, texts: list[str]) -> list[Prediction]:
    """Return the five top categories of each text, with decisions if the model has them.

    Raises:
        InvalidText, ClassifierError: as `Classifier.classify`.
    """
    most = desk.categories()
    return desk.classifier.classify(texts, min(TOP_K, len(most)), decisions=desk.classifier.has_decisions())


def words_that_decided(desk: Desk, text: str) -> list[tuple[str, str]]:
    """Return the pieces of a text in order, each with the class of its colour; "" for none."""
    from aisle.train.evaluation.attribution import OCCLUSION, marks, read
    from aisle.train.evaluation.explain import explain

    prepared = prepare(text)
    words = read(prepared, None).words
    if len(words) > MOST_WORDS:
        prepared = prepared[: words[MOST_WORDS][0]]
    (found,) = explain([prepared], url=desk.options.url)["explanations"]
    return [(piece, _shade(share)) for piece, share in marks(found, OCCLUSION)]


def _shade(share: float) -> str:
    if abs(share) < 0.05:
        return ""
    return f"{'for' if share > 0 else 'against'}-{min(SHADES, 1 + int(abs(share) * SHADES))}"


def _what_is_read(desk: Desk, prepared: str, version: int) -> tuple[str, str]:
    """Return the part of a cleaned text that the model reads, and the part beyond its token limit.

    The tokenizer is in the model repository. Without that, all is taken as read.
    """
    if version not in versions(desk.options.repository):
        return prepared, ""
    from aisle.train.evaluation.attribution import read

    tokenizer = TextTokenizer.of_version(desk.options.repository / "tokenizer" / str(version))
    text = read(prepared, tokenizer).text
    return text, prepared[len(text) :]
