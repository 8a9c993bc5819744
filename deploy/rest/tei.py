"""The routes of text-embeddings-inference for a classifier, so that its clients work unchanged."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, RootModel, StrictBool
from starlette.responses import Response

import aisle
from aisle.client import AsyncClassifier, InvalidText, Prediction
from aisle.client.protocol import MODEL
from aisle.client.wire import Wanted
from aisle.deploy.rest.bodies import check_query, read_json
from aisle.deploy.rest.errors import BACKEND, UNHEALTHY, Fault, json_response
from aisle.deploy.rest.front import REQUESTS, Front, classify
from aisle.deploy.rest.models import ErrorBody, checked
from aisle.deploy.rest.openapi import faults, takes

TAG = "text-embeddings-inference"
TEXT = {"type": "string", "minLength": 1}
INPUTS = {
    "anyOf": [
        {**TEXT, "description": "One text."},
        {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 1, "description": "One text."},
        {
            "type": "array",
            "items": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 1},
            "minItems": 1,
            "description": "Several texts.",
        },
    ]
}
FORMS = "inputs must be a text, or a list of lists of one text each"


class PredictRequest(BaseModel):
    """One text, or several. Other fields, such as `truncate`, have no effect: longer texts are always cut."""

    inputs: Annotated[Any, Field(json_schema_extra=INPUTS, examples=["红富士苹果 5斤装"])]
    raw_scores: Annotated[StrictBool, Field(description="Must be false: the server gives probabilities.")] = False


class Score(BaseModel):
    label: str
    score: float


class Scores(RootModel[list[Score] | list[list[Score]]]):
    """The probability of every category, best first: for one text a list, for several a list of lists."""


class Info(BaseModel):
    """What is known of the served model; text-embeddings-inference tells more about itself."""

    model_id: str
    model_type: dict[str, dict[str, dict[str, Any]]]
    max_client_batch_size: int
    max_concurrent_requests: int
    auto_truncate: bool
    version: str


def routes(front: Front) -> APIRouter:
    router = APIRouter(tags=[TAG])
    _add_predict(router, front)
    _add_health(router, front)
    _add_info(router, front)
    return router


def _add_predict(router: APIRouter, front: Front) -> None:
    async def predict(request: Request) -> Response:
        """Score every category, for one text or several."""
        check_query(request)
        with front.requests.one():
            body = checked(PredictRequest, await read_json(request))
            if body.raw_scores:
                raise Fault(422, "raw_scores must be false: the server gives probabilities only")
            texts, single = texts_of(body.inputs)
            rows = [_scores(each) for each in await all_categories(front, request, texts)]
        return json_response(rows[0] if single else rows)

    for path in ("/predict", "/"):
        answers = faults({200: {"model": Scores}})
        router.post(path, responses=answers, openapi_extra=takes(PredictRequest), response_class=Response)(predict)


def _add_health(router: APIRouter, front: Front) -> None:
    async def health() -> Response:
        """Whether the server behind answers."""
        try:
            await front.probe()
        except Exception as error:
            raise Fault(503, "unhealthy", UNHEALTHY, why=str(error)) from None
        return Response()

    for path in ("/health", "/"):
        router.get(path, responses={503: {"model": ErrorBody}}, response_class=Response)(health)


def _add_info(router: APIRouter, front: Front) -> None:
    @router.get("/info", responses=faults({200: {"model": Info}}), response_class=Response)
    async def info(request: Request) -> Response:
        """What is known of the model. The numbers of its categories are only of this list, in alphabetical order."""
        (answer,) = await all_categories(front, request, ["probe"])
        names = sorted(answer.categories)  # the model's own order is not known outside the server
        classifier = {
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
        }
        return json_response(
            {
                "model_id": f"{MODEL}/{answer.version}",
                "model_type": {"classifier": classifier},
                "max_client_batch_size": await front.client(request).max_batch(),
                "max_concurrent_requests": REQUESTS,
                "auto_truncate": True,
                "version": aisle.__version__,
            }
        )


def texts_of(inputs: Any) -> tuple[list[object], bool]:
    """Return the texts of `inputs`, and whether it is one text and not a list of several.

    Raises:
        Fault: 422, it has another form, or holds a pair of texts, which this model cannot read.
    """
    if isinstance(inputs, str):
        return [inputs], True
    if not isinstance(inputs, list) or not inputs:
        raise Fault(422, FORMS)
    if isinstance(inputs[0], str):
        return [_only(inputs)], True
    return [_only(each) for each in inputs], False


def _only(sequence: Any) -> str:
    if not isinstance(sequence, list) or not all(isinstance(each, str) for each in sequence):
        raise Fault(422, FORMS)
    if len(sequence) == 2:
        raise Fault(422, "a pair of texts cannot be classified; for several texts send [[text], [text], …]")
    if len(sequence) != 1:
        raise Fault(422, FORMS)
    text: str = sequence[0]
    return text


async def all_categories(front: Front, request: Request, texts: list[object]) -> list[Prediction]:
    """Classify texts, with every category in each answer.

    Raises:
        Fault: 502, the server does not tell how many categories it has; 503, the model is being replaced.
        InvalidText, ClassifierError: as `classify`.
    """
    client = front.client(request)
    for counts in (front.category_counts, {}):  # what was known may be out of date
        counts = front.category_counts = counts or await client.category_counts()
        if not counts:
            raise Fault(502, "the server does not tell how many categories it has; start it with this Aisle", BACKEND)
        if answers := await _complete(client, request, texts, counts):
            return answers
    raise Fault(503, "the model is being replaced; try again", UNHEALTHY, headers={"Retry-After": "1"})


async def _complete(
    client: AsyncClassifier, request: Request, texts: list[object], counts: dict[int, int]
) -> list[Prediction] | None:
    """Return answers with all categories of the version that gave them, or None.

    The versions of a canary may have different numbers of categories, and only the answer says which one answered.
    """
    for k in sorted({*counts.values()}, reverse=True):
        try:
            answers = await classify(client, request, texts, Wanted(k))
        except InvalidText as error:
            if not str(error).startswith("top_k"):
                raise
        else:
            if counts.get(answers[0].version) == k:
                return answers
    return None


def _scores(prediction: Prediction) -> list[dict[str, Any]]:
    pairs = zip(prediction.categories, prediction.confidences, strict=True)
    return [{"score": score, "label": label} for label, score in pairs]
