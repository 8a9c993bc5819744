"""What OpenAPI describes beyond the routes: bodies that the routes read themselves, errors and tokens."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from aisle.deploy.rest.bodies import JSON
from aisle.deploy.rest.errors import ASK_FOR_TOKEN, RETRY_SECONDS
from aisle.deploy.rest.models import ErrorBody

ERRORS = {
    400: "The body is not JSON.",
    401: f"The token is missing or unknown; with `WWW-Authenticate: {ASK_FOR_TOKEN['WWW-Authenticate']}`.",
    403: "The gateway does not allow it.",
    408: "The body did not arrive in time.",
    413: "The body is too large, or holds too many texts.",
    415: "The body has another content type, or is compressed.",
    422: "A field or a text cannot be used; the error says what to change.",
    429: f"Too many requests; `Retry-After` says when to try again, in seconds ({RETRY_SECONDS} or more).",
    500: "A bug of the front.",
    502: "The server failed.",
    503: "No server answers.",
    504: "The server did not answer in time.",
}
SECURITY = {
    "basic": {"type": "http", "scheme": "basic", "description": "NAME and SECRET of a client of the gateway."},
    "bearer": {"type": "http", "scheme": "bearer", "description": "NAME:SECRET of a client of the gateway."},
}


def faults(answers: dict[int | str, dict[str, Any]]) -> dict[int | str, dict[str, Any]]:
    """Return the answers of a route, with those to all faults."""
    return {**answers, **{status: {"model": ErrorBody, "description": text} for status, text in ERRORS.items()}}


def takes(body: type[BaseModel] | dict[str, Any], content_type: str = JSON) -> dict[str, Any]:
    """Return the description of a body that the route reads itself, and of the tokens that it takes."""
    schema = body if isinstance(body, dict) else body.model_json_schema()
    return {
        "requestBody": {"required": True, "content": {content_type: {"schema": schema}}},
        "security": [{}, *({name: []} for name in SECURITY)],
    }


def describe_tokens(app: FastAPI) -> None:
    """Add the forms of tokens to the description, once all routes are known."""
    app.openapi()["components"]["securitySchemes"] = SECURITY
