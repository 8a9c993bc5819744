"""The application: the guard, the pages, and what every error becomes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from aisle.deploy.desk.desk import Desk
from aisle.deploy.desk.errors import problem_of
from aisle.deploy.desk.guard import add_guard
from aisle.deploy.desk.pages import files, jobs, models, quality, review, trying

PAGES = (trying, files, review, quality, models, jobs)


def create_app(desk: Desk) -> FastAPI:
    """Return the application; its jobs run while it is served."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        files.clean_up(desk)
        desk.jobs.start()
        yield
        desk.jobs.stop()

    app = FastAPI(title="Aisle desk", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    async def answer_error(request: Request, error: Exception) -> Response:
        return desk.problem(request, problem_of(error))

    # What the framework refuses, such as an unknown path. The guard answers all other errors.
    app.add_exception_handler(HTTPException, answer_error)
    app.add_exception_handler(RequestValidationError, answer_error)
    for page in PAGES:
        app.include_router(page.routes(desk))
    app.mount("/static", StaticFiles(directory=Path(__file__).with_name("static")))
    add_guard(app, desk)
    return app
