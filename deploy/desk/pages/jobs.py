"""The state of a job, which pages show and renew while it is active."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from aisle.deploy.desk.desk import Desk
from aisle.deploy.desk.errors import Problem
from aisle.deploy.desk.pages.models import trial


def routes(desk: Desk) -> APIRouter:
    router = APIRouter()

    @router.get("/jobs/{job}")
    def state(request: Request, job: int) -> Response:
        """Once the job has ended, the page is loaded again, because its other parts depend on it."""
        found = desk.jobs.get(job)
        if found is None:
            raise Problem("This job does not exist.", 404)
        progress = desk.jobs.progress(job)
        answer = desk.render(request, "_job.html", job=found, progress=progress, trial=trial(desk, found))
        if not found.active:
            answer.headers["HX-Refresh"] = "true"
        return answer

    @router.post("/jobs/{job}/stop")
    def stop(request: Request, job: int) -> Response:
        desk.jobs.cancel(job, desk.person(request))
        return state(request, job)

    return router
