"""The outermost layer: who may ask for what. Sessions, logins, forged requests and headers of the answers."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from fastapi import APIRouter, FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from aisle.deploy.desk import languages
from aisle.deploy.desk.desk import Desk
from aisle.deploy.desk.errors import Problem, problem_of
from aisle.deploy.desk.store import note, set_setting, setting

SESSION_SECONDS = 12 * 3600
FORM_BYTES = 256 * 1024
TOKEN = "x-csrf-token"
SAFE = ("GET", "HEAD", "OPTIONS")
OPEN = ("/login", "/language", "/health")  # without a login
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'self'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
}
Next = Callable[[Request], Awaitable[Response]]


async def form(request: Request) -> dict[str, list[str]]:
    """Return the fields of a form.

    Raises:
        Problem: the form is too large.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > FORM_BYTES:
            raise Problem("This is too long: {limit} KiB at most.", 413, limit=FORM_BYTES // 1024)
    found: dict[str, list[str]] = {}
    for name, value in parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True):
        found.setdefault(name, []).append(value)
    return found


def field(fields: dict[str, list[str]], name: str) -> str:
    """Return a field of a form; empty if it is missing."""
    return fields.get(name, [""])[0]


def add_guard(app: FastAPI, desk: Desk) -> None:
    """Add the login and the checks of every request."""

    @app.middleware("http")
    async def guard(request: Request, call_next: Next) -> Response:
        try:
            answer = _refusal(desk, request) or await call_next(request)
        except Exception as error:
            answer = desk.problem(request, problem_of(error))
        answer.headers.update(HEADERS)
        if not request.url.path.startswith("/static/"):
            answer.headers.setdefault("Cache-Control", "no-store")
        return answer

    app.add_middleware(
        SessionMiddleware,
        secret_key=desk.secret,
        session_cookie="aisle_desk",
        max_age=SESSION_SECONDS,
        same_site="strict",
        https_only=desk.options.certificate is not None,
    )
    app.include_router(_routes(desk))


def _refusal(desk: Desk, request: Request) -> Response | None:
    """Return the answer to a request that is not allowed; None if it is.

    Raises:
        Problem: it comes from another site.
    """
    if desk.options.loopback and (request.url.hostname or "") not in ("localhost", "127.0.0.1", "::1"):
        # Another site's name can point to 127.0.0.1 (DNS rebinding).
        raise Problem("Open this desk as localhost.", 421)
    if request.url.path.startswith("/static/"):
        return None
    session = request.session
    if "csrf" not in session:
        session["csrf"] = secrets.token_urlsafe(24)
    person = session.get("person")
    if person is not None and _is_over(desk, person, session):
        session.pop("person")
        person = None
    if request.method not in SAFE:
        origin = request.headers.get("origin")
        own = urlsplit(str(request.url)).netloc
        token = request.headers.get(TOKEN, "")
        if (origin and urlsplit(origin).netloc != own) or not hmac.compare_digest(
            token.encode(), session["csrf"].encode()
        ):
            return Response(status_code=403, headers={"HX-Refresh": "true"})  # the session is over, or not ours
    if desk.login and person is None and request.url.path not in OPEN:
        if request.headers.get("hx-request") or request.method not in SAFE:
            return Response(status_code=401, headers={"HX-Redirect": "/login"})
        session["next"] = request.url.path
        return RedirectResponse("/login", 303)
    return None


def _is_over(desk: Desk, person: str, session: dict[str, Any]) -> bool:
    """Return whether a session has ended: the person is removed, has another password, or has logged out since."""
    if desk.users.stamp(person) != session.get("stamp"):
        return True
    with desk.store.read() as db:
        ended = float(setting(db, _logged_out(person)) or 0)
    return ended >= float(session["since"])


def _logged_out(person: str) -> str:
    return f"logged out: {person}"


def _routes(desk: Desk) -> APIRouter:
    router = APIRouter()

    @router.get("/login")
    def show_login(request: Request) -> Response:
        return desk.render(request, "login.html")

    @router.post("/login")
    async def log_in(request: Request) -> Response:
        fields = await form(request)
        name, password = field(fields, "name").strip(), field(fields, "password")
        wait = desk.users.begin_try(name)
        if wait:
            raise Problem("Too many wrong passwords. Try again in {seconds} seconds.", 429, seconds=round(wait) + 1)
        if not await run_in_threadpool(desk.users.check, name, password):
            raise Problem("The name or the password is wrong.", 403)
        desk.users.forget_tries(name)
        language, following = request.session.get("language"), request.session.get("next", "/")
        request.session.clear()  # a new session, which nobody else can have prepared
        request.session.update(
            person=name, stamp=desk.users.stamp(name), since=time.time(), csrf=secrets.token_urlsafe(24)
        )
        if language:
            request.session["language"] = language
        with desk.store.write() as db:
            note(db, name, "login")
        return Response(headers={"HX-Redirect": following})

    @router.post("/logout")
    def log_out(request: Request) -> Response:
        """End all sessions of the person, also those of a stolen cookie."""
        with desk.store.write() as db:
            set_setting(db, _logged_out(desk.person(request)), str(time.time()))
        request.session.clear()
        return Response(headers={"HX-Redirect": "/login"})

    @router.post("/language")
    async def choose_language(request: Request) -> Response:
        wanted = field(await form(request), "language")
        if wanted not in languages.NAMES:
            raise Problem("This language is not known.")
        request.session["language"] = wanted
        return Response(headers={"HX-Refresh": "true"})

    @router.get("/health")
    def health() -> Response:
        """Whether this process answers."""
        return Response("ok", media_type="text/plain")

    return router
