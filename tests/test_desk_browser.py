"""The desk in a real Chromium: the whole way of a catalogue team, its keyboard, small screens and accessibility."""

from __future__ import annotations

import csv
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from aisle.client import Classifier
from aisle.deploy.desk.store import Store
from aisle.deploy.desk.users import Users
from aisle.deploy.server.triton import ServerOptions, free_ports, running
from aisle.preprocess.tables.table import read_rows

from .desk import RunningDesk, running_desk

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]
PASSWORD = "correct horse battery"
PATIENCE = 240_000  # milliseconds; for a machine that does much else
PEOPLE = ("li", "han")
ROWS = 2000
LABELLED = 20


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def desk(repository: Path, checkpoint: Path, sample: Path, tmp_path: Path) -> Iterator[RunningDesk]:
    """A desk with two people, and a server of its own, because its model will change."""
    own = tmp_path / "repository"
    shutil.copytree(repository, own)
    folder = tmp_path / "desk"
    users = Users(folder / "users.json")
    for name in PEOPLE:
        users.set_password(name, PASSWORD)
    grpc, metrics = free_ports(2)
    with (tmp_path / "log").open("wb") as log, running(ServerOptions(own, grpc_port=grpc, metrics_port=metrics), log):
        options = ("--repository", own, "--checkpoint", checkpoint, "--data", sample)
        with running_desk(folder, f"localhost:{grpc}", *options) as each:
            yield each


def visitor(browser: Browser, desk: RunningDesk, name: str) -> tuple[BrowserContext, Page]:
    """Return the browser of a person who has logged in."""
    context = browser.new_context(locale="en-US", viewport={"width": 360, "height": 780})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(desk.url)
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_url(f"{desk.url}/")
    return context, page


def check_accessible(page: Page) -> None:
    """Check with axe, in light and dark, that nothing serious is wrong, and that nothing is wider than the screen."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        found = Axe().run(page).response["violations"]
        assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == [], found
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), page.url
    page.emulate_media(color_scheme="light")
