"""Review: one uncertain text at a time, which people label with the keyboard."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from aisle.client import ClassifierError, Prediction
from aisle.deploy.desk import languages, queue
from aisle.deploy.desk.desk import Desk
from aisle.deploy.desk.errors import Problem
from aisle.deploy.desk.guard import field, form
from aisle.deploy.desk.pages.trying import predict
from aisle.deploy.desk.queue import Batch, Item, Kind
from aisle.deploy.desk.similar import MOST as MOST_SIMILAR
from aisle.deploy.desk.similar import Similar
from aisle.deploy.desk.typeahead import Catalogue
from aisle.errors import InputError

CHOICES = 9  # one for each digit
MOST_USED = 1000  # categories that a search puts first
RETRY_SECONDS = 30.0  # a server that is down is not asked for so long, so that labelling stays fast
LONGEST_QUERY = 200  # characters

Fields = dict[str, list[str]]
Known = TypeVar("Known")
KINDS: dict[str, Kind] = {"": "category", "none": "none", "skip": "skip"}  # of the form's field


@dataclass(frozen=True)
class Notice:
    """A sentence above the text."""

    text: str
    values: dict[str, object]
    warn: bool = False


@dataclass(frozen=True)
class Choice:
    """A category with a key of its own."""

    category: str
    confidence: float | None  # None if people chose it often


def routes(desk: Desk) -> APIRouter:
    router = APIRouter(prefix="/review")
    page = _Page(desk)

    @router.get("")
    def show(request: Request) -> Response:
        return page.show(request, "review.html")

    @router.post("/label")
    async def label(request: Request) -> Response:
        return await run_in_threadpool(page.label, request, await form(request))

    @router.post("/undo")
    def undo(request: Request) -> Response:
        return page.undo(request)

    @router.post("/skipped")
    def bring_back(request: Request) -> Response:
        """Give a person again what they skipped."""
        with desk.store.write() as db:
            queue.bring_back(db, desk.person(request))
        return page.show(request, "_item.html")

    @router.get("/categories")
    def search(request: Request, q: str = "") -> Response:
        return page.search(request, q)

    @router.get("/similar")
    def similar(request: Request, item: int) -> Response:
        return page.similar(request, item)

    @router.get("/summary")
    def summary(request: Request) -> Response:
        with desk.store.read() as db:
            people, agreement = queue.people(db), queue.agreement(db)
        return desk.render(request, "_review_summary.html", people=people, agreement=agreement)

    return router


class _Page:
    """Answers the requests of the page."""

    def __init__(self, desk: Desk) -> None:
        self._desk, self._model, self._similar = desk, _Model(desk), Similar()

    def show(self, request: Request, template: str, *notices: Notice, status: int = 200) -> Response:
        """Give the person a text and show it. All is written before it is shown."""
        person = self._desk.person(request)
        with self._desk.store.write() as db:
            self._desk.set_team(db)
            item = queue.take(db, person, time.time())
            progress, used = queue.progress(db, person), queue.most_used(db, CHOICES)
        prediction = self._model.predict(item.text) if item else None
        language = self._desk.language(request)
        values: dict[str, Any] = {
            "item": item,
            "prediction": prediction,
            "choices": _choices(item, prediction, used) if item else [],
            "progress": progress,
            "said": [(languages.translate(language, each.text, **each.values), each.warn) for each in notices],
        }
        return self._desk.render(request, template, status, **values)

    def label(self, request: Request, fields: Fields) -> Response:
        """Label the text on the screen, and the similar ones that are ticked."""
        person = self._desk.person(request)
        try:
            item, also = _numbers(fields)
            kind, category = self._chosen(fields)
            # Who skips a text does not decide on its similar ones.
            numbers = [item] if kind == "skip" else [item, *also]
            with self._desk.store.write() as db:
                batch = queue.label(db, person, numbers, kind, category, time.time())
        except Problem as problem:
            return self._refuse(request, problem)
        return self.show(request, "_item.html", *_notices(batch, numbers, kind, category))

    def undo(self, request: Request) -> Response:
        """Take the last label back, and show its text."""
        try:
            with self._desk.store.write() as db:
                queue.undo(db, self._desk.person(request), time.time())
        except Problem as problem:
            return self._refuse(request, problem)
        return self.show(request, "_item.html", Notice("Your last label was taken back.", {}))

    def search(self, request: Request, query: str) -> Response:
        catalogue = self._catalogue()
        with self._desk.store.read() as db:
            used = queue.most_used(db, MOST_USED)
        found = catalogue.search(query[:LONGEST_QUERY], used)
        return self._desk.render(request, "_review_options.html", found=found, query=query)

    def similar(self, request: Request, item: int) -> Response:
        with self._desk.store.read() as db:
            found = self._similar.find(db, self._desk.person(request), item, time.time())
        return self._desk.render(request, "_review_similar.html", similar=found)

    def _refuse(self, request: Request, problem: Problem) -> Response:
        notice = Notice(problem.text, problem.values, warn=True)
        return self.show(request, "_item.html", notice, status=problem.status)

    def _chosen(self, fields: Fields) -> tuple[Kind, str | None]:
        """Return what the person chose.

        Raises:
            Problem: it is nothing, or no category of the model.
        """
        kind, category = KINDS.get(field(fields, "kind")), field(fields, "category")
        if kind is None or (kind == "category" and not category):
            raise Problem("Choose a category.")
        if kind != "category":
            return kind, None
        if category not in self._catalogue():
            raise Problem("{name} is no category of the model.", name=category)
        return kind, category

    def _catalogue(self) -> Catalogue:
        """Return the model's categories. While the server is down: the last ones, or else those in the queue."""
        known = self._model.catalogue()
        if known is not None:
            return known
        with self._desk.store.read() as db:
            return Catalogue(queue.named(db))


class _Model:
    """The live model. After a failure, the server is left alone for `RETRY_SECONDS`."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._retry_at = 0.0
        self._catalogue: Catalogue | None = None

    def predict(self, text: str) -> Prediction | None:
        """Return the top categories of a text; None if the server does not say."""
        return self._ask(lambda: predict(self._desk, [text])[0])

    def catalogue(self) -> Catalogue | None:
        """Return the categories, or the last ones if the server does not answer; None if there are none yet."""
        categories = self._ask(self._desk.categories)
        if categories is not None and (self._catalogue is None or self._catalogue.categories is not categories):
            self._catalogue = Catalogue(categories)
        return self._catalogue

    def _ask(self, question: Callable[[], Known]) -> Known | None:
        if time.monotonic() < self._retry_at:
            return None
        try:
            return question()
        except ClassifierError:
            self._retry_at = time.monotonic() + RETRY_SECONDS
        except InputError:  # the server refuses this text only
            pass
        return None


def _choices(item: Item, prediction: Prediction | None, used: list[str]) -> list[Choice]:
    """Return the categories that get a key: the model's, those of the text's table, then those that people use most."""
    shown: dict[str, float | None] = {}
    if prediction:
        shown = dict(zip(prediction.categories, prediction.confidences, strict=True))
    shown.setdefault(item.category, item.confidence)
    if item.category_2:
        shown.setdefault(item.category_2, item.confidence_2)
    for each in used:
        shown.setdefault(each, None)
    return [Choice(category, confidence) for category, confidence in shown.items()][:CHOICES]


def _numbers(fields: Fields) -> tuple[int, list[int]]:
    """Return the number of the text on the screen, and those of the similar texts that are ticked.

    Raises:
        Problem: one of them is no number, or there are too many.
    """
    try:
        numbers = [int(each) for each in (field(fields, "item"), *fields.get("also", ()))]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= MOST_SIMILAR + 1 or not all(0 < each < 2**63 for each in numbers):
        raise Problem("The page is too old. Load it again.")
    return numbers[0], numbers[1:]


def _notices(batch: Batch, numbers: list[int], kind: Kind, category: str | None) -> list[Notice]:
    """Return what to say after a label."""
    done, missed = len(batch.items), len(numbers) - len(batch.items)
    said = []
    if done and kind == "skip":
        said.append(Notice("Skipped.", {}))
    elif done and kind == "none":
        said.append(Notice("{number} labelled: none of these.", {"number": done}))
    elif done:
        said.append(Notice("{number} labelled: {category}", {"number": done, "category": category}))
    if missed:
        text = "{number} not labelled: someone else has it, or it is labelled already."
        said.append(Notice(text, {"number": missed}, warn=True))
    return said
