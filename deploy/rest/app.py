"""The routes of /v1, and the application with all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

import aisle
from aisle.client import ClassifierError, InvalidText
from aisle.client.wire import Wanted
from aisle.deploy.rest import tei
from aisle.deploy.rest.access import WHY
from aisle.deploy.rest.bodies import NDJSON, check_query, check_type, read_json
from aisle.deploy.rest.errors import VALIDATION, Fault, fault_of, fault_of_bug, json_response
from aisle.deploy.rest.front import Front, Upstream, classify
from aisle.deploy.rest.models import (
    ATTRIBUTES,
    DECISIONS,
    TOP_K,
    ClassifyRequest,
    ClassifyResponse,
    Health,
    answer_of,
    checked,
)
from aisle.deploy.rest.ndjson import AnswerStream, wanted_of
from aisle.deploy.rest.openapi import describe_tokens, faults, takes
from aisle.deploy.rest.page import add_page

STREAM = """Classify a file of any size.

Each line holds one JSON value: a text, or an object with the field `text`. One line is answered for each line, in the
same order: an answer, or an `error`. Read the answers while you send, as curl does: the front reads on only as fast as
its answers are read.
"""
LINES = {  # without a type, since any bytes are lines
    "description": "One JSON value in each line.",
    "example": '"usb c cable 2m"\n{"text": "苹果"}\n',
}
QUERY = [
    {
        "name": "top_k",
        "in": "query",
        "description": TOP_K,
        "schema": {"type": "integer", "minimum": 1},
    },
    {"name": "decisions", "in": "query", "description": DECISIONS, "schema": {"type": "boolean", "default": False}},
    {"name": "attributes", "in": "query", "description": ATTRIBUTES, "schema": {"type": "boolean", "default": False}},
]


def create_app(upstream: Upstream) -> FastAPI:
    """Return the application in front of a server or a gateway. It connects at the first request."""
    front = Front(upstream)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await front.close()

    app = FastAPI(
        title="Aisle",
        version=aisle.__version__,
        summary="Product text in, category out",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    for kind in (Fault, InvalidText, ClassifierError, Exception):
        app.add_exception_handler(kind, _answer_fault)
    app.add_exception_handler(HTTPException, _answer_http)
    _add_classify(app, front)
    _add_health(app, front)
    app.include_router(tei.routes(front))
    add_page(app)
    describe_tokens(app)
    return app


def _add_classify(app: FastAPI, front: Front) -> None:
    answers = faults({200: {"model": ClassifyResponse}})

    @app.post("/v1/classify", responses=answers, openapi_extra=takes(ClassifyRequest), response_class=Response)
    async def classify_texts(request: Request) -> Response:
        """Classify a list of texts."""
        check_query(request)
        with front.requests.one():
            client = front.client(request)
            body = checked(ClassifyRequest, await read_json(request))
            wanted = Wanted(body.top_k, body.decisions, attributes=body.attributes)
            found = await classify(client, request, body.texts, wanted)
        return json_response({"predictions": [answer_of(each) for each in found]})

    answers = faults({200: {"content": {NDJSON: {"schema": {"type": "string"}}}}})
    extra = {**takes(LINES, NDJSON), "parameters": QUERY}

    @app.post(
        "/v1/classify/stream",
        responses=answers,
        openapi_extra=extra,
        description=STREAM,
        response_class=Response,
    )
    async def classify_lines(request: Request) -> Response:
        check_query(request, "top_k", "decisions", "attributes")
        check_type(request, NDJSON)
        client, bulk = front.client(request), front.client(request, bulk=True)
        return AnswerStream(request, client, bulk, wanted_of(request), front.streams)


def _add_health(app: FastAPI, front: Front) -> None:
    @app.get("/v1/health", responses=faults({200: {"model": Health}}), response_class=Response)
    async def ready() -> Response:
        """Whether the server behind answers: for a readiness probe."""
        version = await front.probe()
        return json_response({"status": "ready", "version": version})

    @app.get("/v1/health/live", responses={200: {"model": Health}}, response_class=Response)
    async def live() -> Response:
        """Whether this process answers: for a liveness probe."""
        return json_response({"status": "live", "version": None})


async def _answer_fault(request: Request, error: Exception) -> Response:
    fault = fault_of(error) or fault_of_bug(error)
    request.scope[WHY] = fault.why
    return fault.response()


async def _answer_http(request: Request, error: Exception) -> Response:
    """Answer what the framework refuses, such as an unknown path, in the common form."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:  # the framework names the methods of only one of the path's routes
        routes = [each for each in request.app.routes if getattr(each, "path", None) == request.url.path]
        headers["Allow"] = ", ".join(sorted({method for each in routes for method in each.methods}))
    return json_response({"error": error.detail, "error_type": VALIDATION}, error.status_code, headers)
