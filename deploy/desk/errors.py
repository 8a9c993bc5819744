"""The one table of errors: which sentence and HTTP status each error becomes."""

from __future__ import annotations

import sqlite3

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from aisle.client import ClassifierError, Overloaded, Unavailable
from aisle.console import say
from aisle.deploy.rest.errors import fault_of_bug
from aisle.errors import InputError, ServerError


class Problem(Exception):
    """Something that the person can correct: a sentence on the page."""

    def __init__(self, text: str, status: int = 422, **values: object) -> None:
        """`text` is English and is translated; `{name}` in it stands for a value."""
        super().__init__(text)
        self.text, self.status, self.values = text, status, values


def problem_of(error: Exception) -> Problem:
    """Return the sentence for an error."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, Overloaded):
        return Problem("The server is busy. Try again in a moment.", 503)
    if isinstance(error, Unavailable):
        return Problem("No server answers. Is it running? ({detail})", 503, detail=str(error))
    if isinstance(error, ClassifierError):
        return Problem("The server refused: {detail}", 502, detail=str(error))
    if isinstance(error, (InputError, ServerError)):
        return Problem("{detail}", 422, detail=str(error))
    if isinstance(error, HTTPException):
        text = "This page does not exist." if error.status_code == 404 else "{detail}"
        return Problem(text, error.status_code, detail=error.detail)
    if isinstance(error, ClientDisconnect):
        return Problem("The upload broke off. Try again.", 400)
    if isinstance(error, (RequestValidationError, OverflowError)):  # a part of the address is no number of ours
        return Problem("This page does not exist.", 404)
    if isinstance(error, (sqlite3.Error, OSError)):
        return Problem("The desk cannot write: {detail}", 507, detail=str(error))
    bug = fault_of_bug(error).why
    say(f"a bug of the desk: {bug}")
    return Problem("The desk failed; this is a bug ({detail}).", 500, detail=bug)
