"""What all pages share: the settings, the server, the store, the people, the jobs, and how a page is rendered."""

from __future__ import annotations

import secrets
import sqlite3
import threading
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

import aisle
from aisle.build.repository import read_report
from aisle.client import Classifier
from aisle.deploy.desk import languages, queue
from aisle.deploy.desk.errors import Problem
from aisle.deploy.desk.jobs import TITLES, Jobs
from aisle.deploy.desk.store import Store, follow_folder, setting
from aisle.deploy.desk.users import NOBODY, Users
from aisle.deploy.server.release import Release
from aisle.errors import InputError
from aisle.files import write_private
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.multi_label import FILE as THRESHOLDS
from aisle.train.evaluation.predictors import MOST_CATEGORIES, largest_top_k

CHECKPOINT = "checkpoint"  # setting: the checkpoint that the live version was made from
PAGES = (("/", "Try"), ("/files", "Files"), ("/review", "Review"), ("/quality", "Quality"), ("/models", "Models"))


@dataclass(frozen=True)
class DeskOptions:
    """Where to listen, which server to use, and what the pages on quality and models work on."""

    url: str
    folder: Path  # of the desk's own files
    host: str = "127.0.0.1"
    port: int = 8090
    repository: Path = Path("model_repository")
    checkpoint: Path | None = None  # for Quality and Models
    data: Path | None = None  # its training table
    text_column: str = "text"  # of the training table
    label_column: str = "category"
    log: Path | None = None  # of live traffic, for drift
    certificate: Path | None = None  # PEM; both or neither
    key: Path | None = None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the desk."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class Desk:
    """One desk. All its methods can be called from any thread."""

    def __init__(self, options: DeskOptions) -> None:
        """Open the desk's folder.

        Raises:
            InputError: the folder cannot be used, or people are needed and there are none.
        """
        self.options = options
        if options.checkpoint and (options.checkpoint / THRESHOLDS).is_file():
            Checkpoint(options.checkpoint).check_one_category("aisle desk")
        try:
            options.folder.mkdir(parents=True, exist_ok=True)
            options.folder.chmod(0o700)
            self.secret = _secret(options.folder / "secret")
        except OSError as error:
            raise InputError(f"cannot write to {options.folder}: {error.strerror}; choose another --folder") from None
        self.users = Users(options.folder / "users.json")
        if not options.loopback and not self.users.names():
            raise InputError(
                f"others can reach {options.host}, so people must log in; add the first with: "
                f"aisle desk-user NAME --folder {options.folder}"
            )
        self.store = Store(options.folder / "desk.sqlite")
        with self.store.write() as db:
            follow_folder(db, options.folder.resolve())
            self.set_team(db)
        self._categories: tuple[int, list[str]] = 0, []  # of a version
        self._categories_lock = threading.Lock()
        self.jobs = Jobs(self.store, options.folder / "jobs")
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        self._templates.filters |= {"when": _when, "percent": _percent}

    def set_team(self, db: sqlite3.Connection) -> None:
        """Tell the review queue who uses the desk. People come and go while it runs."""
        queue.set_team(db, self.users.names() or [NOBODY])

    @property
    def login(self) -> bool:
        """Whether people must log in: as soon as there are any, and where others can reach the desk."""
        return not self.options.loopback or bool(self.users.names())

    @cached_property
    def classifier(self) -> Classifier:
        """The connection to the server; AISLE_TLS_CA and AISLE_TOKEN apply."""
        return Classifier.from_environment(self.options.url)

    def categories(self) -> list[str]:
        """Return all categories of the live model, in alphabetical order.

        Raises:
            ClassifierError: the server does not answer.
        """
        self.check_one_category()
        with self._categories_lock:
            live = self.classifier.classify(["probe"])[0].version
            if self._categories[0] != live:
                top_k = largest_top_k(self.classifier, MOST_CATEGORIES)
                (answer,) = self.classifier.classify(["probe"], top_k)
                self._categories = answer.version, sorted(answer.categories)
            return self._categories[1]

    def check_one_category(self) -> None:
        """Check that the live model gives a text one category, which all pages need.

        Raises:
            InputError: it gives several.
            ClassifierError: the server does not answer.
        """
        if self.classifier.models().multi_label:
            raise InputError("the server's model is multi-label; the desk needs one that gives a text one category")

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that the live version was made from; if none is known to be, the last that was rolled out."""
        with self.store.read() as db:
            kept = setting(db, CHECKPOINT)
        last = Path(kept) if kept else self.options.checkpoint
        live = _checkpoint_of_live_version(self.options.repository)
        made = sorted((self.options.folder.resolve() / "checkpoints").glob("*"))
        known = (each for each in (last, self.options.checkpoint, *made) if each)
        return next((each for each in known if live and _fingerprint(each) == live), last)

    def person(self, request: Request) -> str:
        """Return who asks."""
        return str(request.session.get("person", NOBODY))

    def language(self, request: Request) -> str:
        kept = request.session.get("language")
        return str(kept) if kept in languages.NAMES else languages.preferred(request.headers.get("accept-language", ""))

    def render(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """Return a template as the answer, in the person's language."""
        language = self.language(request)

        def translate(text: str, **parts: object) -> str:
            return languages.translate(language, text, **parts)

        context = {
            "_": translate,
            "language": language,
            "languages": languages.NAMES,
            "pages": PAGES,
            "titles": TITLES,
            "path": request.url.path,
            "person": self.person(request),
            "login": self.login,
            "csrf": request.session.get("csrf", ""),
            "version": aisle.__version__,
            "options": self.options,
        }
        return HTMLResponse(self._templates.get_template(template).render({**context, **values}), status)

    def problem(self, request: Request, problem: Problem) -> Response:
        """Return a sentence: as a part of the page if htmx asks, otherwise as a page."""
        sentence = languages.translate(self.language(request), problem.text, **problem.values)
        template = "_problem.html" if request.headers.get("hx-request") else "problem.html"
        return self.render(request, template, problem.status, sentence=sentence)


def _checkpoint_of_live_version(repository: Path) -> str:
    """Return the fingerprint of the checkpoint that the live version was built from; empty if that is not known."""
    try:
        return str(read_report(repository, Release.load(repository).live).get("checkpoint", ""))
    except InputError:
        return ""


def _fingerprint(checkpoint: Path) -> str:
    """Return a checkpoint's fingerprint; empty if it is none."""
    try:
        changed = (checkpoint / "model.safetensors").stat().st_mtime_ns
        return _fingerprint_at(checkpoint, changed)
    except (OSError, InputError):
        return ""


@lru_cache(maxsize=64)
def _fingerprint_at(checkpoint: Path, changed: int) -> str:
    """Return the fingerprint of a checkpoint as it was at a time: it takes a second for a large one."""
    return Checkpoint(checkpoint).fingerprint


def _secret(path: Path) -> str:
    """Return the key that signs sessions; make it at the first start."""
    if not path.exists():
        write_private(path, secrets.token_hex(32))
    return path.read_text()


def _when(seconds: float | None) -> str:
    return "–" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{share:.{digits}%}"
