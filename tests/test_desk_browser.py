"""The desk in a real Chromium: the whole way of a catalogue team, its keyboard, small screens and accessibility."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from aisle.client import Classifier
from aisle.deploy.desk import queue
from aisle.deploy.desk.store import Store
from aisle.deploy.desk.users import Users
from aisle.preprocess.tables.table import read_rows

from .desk import NOWHERE, RunningDesk, running_desk
from .test_desk_models import CATEGORIES, Pages, drifted, evaluated, retrained, rolled_out, version
from .test_triton import serving

AXE = files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]
PASSWORD = "correct horse battery"
PATIENCE = 240_000  # milliseconds; for a machine that does much else
SETTLED = 300  # milliseconds; the page ignores keys at first, so that a double press labels one text
PEOPLE = ("li", "han")
ROWS = 2000
LABELLED = 20
# What needs a name to be told from others of its kind.
NAMED = {"button", "checkbox", "combobox", "form", "heading", "img", "link", "listbox", "meter", "navigation"}
NAMED |= {"progressbar", "spinbutton", "table", "textbox"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@dataclass(frozen=True)
class Place:
    """A server, and what a desk for it is started with."""

    folder: Path
    url: str
    options: tuple[object, ...]

    def desk(self) -> AbstractContextManager[RunningDesk]:
        return running_desk(self.folder, self.url, *self.options)


@pytest.fixture(scope="module")
def place(
    repository: Path, checkpoint: Path, sample: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """A desk's folder with two people, and a server of its own, because its model will change."""
    base = tmp_path_factory.mktemp("desk")
    own, folder = base / "repository", base / "desk"
    shutil.copytree(repository, own)
    data = base / "data.csv"  # a part of the training table, so that retraining is quick
    data.write_text("".join(sample.read_text("utf-8").splitlines(keepends=True)[: ROWS + 1]), "utf-8")
    users = Users(folder / "users.json")
    for name in PEOPLE:
        users.set_password(name, PASSWORD)
    process, url = serving(own)
    threading.Thread(target=process.communicate, daemon=True).start()  # otherwise its log would fill the pipe
    yield Place(folder, url, ("--repository", own, "--checkpoint", checkpoint, "--data", data))
    process.terminate()
    process.wait(60)


def visitor(browser: Browser, desk: RunningDesk, name: str) -> tuple[BrowserContext, Page]:
    """Return the browser of a person who has logged in."""
    context = browser.new_context(locale="en-US", viewport={"width": 360, "height": 780}, accept_downloads=True)
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
        page.emulate_media(color_scheme=scheme)
        page.evaluate(AXE)
        found = page.evaluate("axe.run()")["violations"]
        assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == [], found
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), page.url
    page.emulate_media(color_scheme="light")
    check_heard(page)


def check_heard(page: Page) -> None:
    """Check what a screen reader says: one first heading, no level left out, names, and headers of tables."""
    lines = page.locator("body").aria_snapshot().splitlines()
    found = [
        match for line in lines if (match := re.match(r"""\s*- '?([a-z]+)(?: "(.*?)")?(?: \[level=(\d)\])?""", line))
    ]
    levels = [int(each[3]) for each in found if each[1] == "heading"]
    assert levels.count(1) == 1 == levels[0], levels
    assert all(later <= level + 1 for level, later in pairwise(levels)), levels
    assert [each[0] for each in found if each[1] in NAMED and not each[2]] == []
    bare = "document.querySelectorAll('main th:not([scope]), main table:not(:has(th))').length"
    assert page.evaluate(bare) == 0, page.url


def classify_table(page: Page, desk: RunningDesk, table: Path, out: Path) -> None:
    """Upload a table, classify it, and download the result."""
    page.goto(f"{desk.url}/files")
    check_accessible(page)
    page.get_by_label("A table").set_input_files(table)
    page.get_by_role("button", name="Upload").click()
    page.get_by_label("Texts to review").fill("60")
    check_accessible(page)
    page.get_by_role("button", name="Classify").click()
    link = page.get_by_role("link", name="Download the result")
    link.wait_for()
    check_accessible(page)
    with page.expect_download() as download:
        link.click()
    download.value.save_as(out)


def label(page: Page, number: int) -> list[str]:
    """Label texts by keyboard alone: the second likely category for each; return the texts."""
    texts: list[str] = []
    subject = page.locator("#review .subject")
    for _ in range(number):
        subject.wait_for()
        text = subject.inner_text()
        assert text not in texts
        texts.append(text)
        page.wait_for_timeout(SETTLED)
        page.keyboard.press("2")
        expect(subject).not_to_have_text(text, timeout=PATIENCE)
        expect(page.locator("#review h2").first).to_be_focused()
    return texts


def test_a_team_tries_reviews_retrains_and_promotes(
    browser: Browser, place: Place, sample: Path, tmp_path: Path
) -> None:
    texts = [row["text"] for row in read_rows(sample)][:ROWS]
    table, out = tmp_path / "catalogue.csv", tmp_path / "result.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "title"], *enumerate(texts)])
    with place.desk() as desk:
        first, second = (visitor(browser, desk, name)[1] for name in PEOPLE)
        first.get_by_label("Text of a product").fill("红富士苹果 5斤装")
        first.get_by_role("button", name="Classify").click()
        first.locator("mark").first.wait_for()
        check_accessible(first)

        classify_table(first, desk, table, out)
        assert [row["title"] or "" for row in read_rows(out)] == texts

        for page in (first, second):
            page.goto(f"{desk.url}/review")
        check_accessible(first)
        labelled = [label(page, LABELLED // 2) for page in (first, second)]
        desk.process.send_signal(signal.SIGKILL)  # right after the last label
        desk.process.wait()
    with Store(place.folder / "desk.sqlite").read() as db:
        kept = {
            (row["person"], row["text"]): row["category"]
            for row in db.execute("SELECT person, text, labels.category FROM labels JOIN items ON items.id = item")
        }
    assert kept.keys() == {(name, text) for name, own in zip(PEOPLE, labelled, strict=True) for text in own}

    reviewed = sorted({text for own in labelled for text in own})
    with Classifier(place.url) as classifier, place.desk() as desk:
        before = [each.category for each in classifier.classify(reviewed)]
        first.goto(f"{desk.url}/quality")
        check_accessible(first)
        first.goto(f"{desk.url}/models")
        check_accessible(first)
        first.get_by_role("button", name="Retrain", exact=True).click()
        first.get_by_role("button", name="Promote at once").wait_for(timeout=3 * PATIENCE)  # a training
        check_accessible(first)
        first.on("dialog", lambda dialog: dialog.accept())
        first.get_by_role("button", name="Promote at once").click()
        first.get_by_text("Version 2 is live.").wait_for()
        after = classifier.classify(reviewed)
        assert {each.version for each in after} == {2}
        wanted = {text: category for (_, text), category in kept.items()}
        changed = [
            text for text, old, new in zip(reviewed, before, after, strict=True) if old != new.category == wanted[text]
        ]
        assert changed
        first.get_by_role("button", name="Roll back").click()
        first.get_by_text("Version 1 is live.").wait_for()
        assert [each.category for each in classifier.classify(reviewed)] == before


def test_a_server_that_is_down_is_a_sentence_on_the_page(browser: Browser, place: Place) -> None:
    with running_desk(place.folder, "localhost:1") as desk:
        _, page = visitor(browser, desk, PEOPLE[0])
        page.get_by_label("Text of a product").fill("苹果")
        page.get_by_role("button", name="Classify").click()
        expect(page.get_by_role("alert")).to_contain_text("No server answers", timeout=PATIENCE)


def test_the_language_and_the_login_work_by_keyboard(browser: Browser, place: Place) -> None:
    with place.desk() as desk:
        _, page = visitor(browser, desk, PEOPLE[0])
        page.get_by_role("button", name="中文").press("Enter")
        page.get_by_role("heading", name="试一条文本").wait_for()
        check_accessible(page)
        page.get_by_role("button", name="退出").press("Enter")
        page.wait_for_url(f"{desk.url}/login")


def test_what_was_typed_stays_in_another_language(browser: Browser, place: Place) -> None:
    with place.desk() as desk:
        _, page = visitor(browser, desk, PEOPLE[0])
        page.get_by_label("Text of a product").fill("红富士苹果")
        page.get_by_role("button", name="中文").click()
        page.get_by_role("heading", name="试一条文本").wait_for()
        expect(page.get_by_role("textbox")).to_have_value("红富士苹果")
        assert page.locator("#answer *").count() == 0  # nothing was asked
        page.get_by_role("button", name="分类").click()
        page.get_by_role("heading", name="类目", exact=True).wait_for()
        page.get_by_role("button", name="English").click()
        page.get_by_role("heading", name="Categories", exact=True).wait_for()
        expect(page.get_by_role("textbox")).to_have_value("红富士苹果")


@pytest.fixture
def results(tmp_path: Path) -> Pages:
    """A desk with a measurement, drift, a retraining, a rollout and texts to review; no server and no training."""
    made = Pages(tmp_path, log=tmp_path / "log.jsonl")
    for name in ("log.jsonl", "corrections.jsonl"):
        (tmp_path / name).touch()
    for number in (1, 2):
        version(tmp_path / "repository", number)
    made.done("evaluate", evaluated(tmp_path / "old"))
    for mix in ((0.4, 0.3, 0.3), (0.1, 0.1, 0.8)):
        made.done("drift", drifted(mix))
    made.agree("数据线", CATEGORIES[2], CATEGORIES[0])
    with made.desk.store.write() as db:
        row = {"text": "苹果", "category": CATEGORIES[0], "confidence": 0.5}
        queue.add(db, 1, [{**row, "category_2": CATEGORIES[1], "confidence_2": 0.4}])
    file = str(tmp_path / "corrections.jsonl")
    made.done("retrain", retrained(tmp_path / "new"), file=file, corrections=2)
    shadow = {"compared": 40, "agreement": 0.95, "asked": 0.9, "changes": {"a → b": 2}}
    made.done("deploy", rolled_out(2, 1, changed=False, shadow=shadow), retraining=1)
    return made


def test_a_screen_reader_reads_the_pages_and_hears_how_a_job_goes(browser: Browser, results: Pages) -> None:
    folder = results.folder
    options = "--repository", folder / "repository", "--checkpoint", folder / "old", "--data", folder / "data.csv"
    with running_desk(folder / "desk", NOWHERE, *options, "--log", folder / "log.jsonl") as desk:
        page = browser.new_context(locale="en-US", viewport={"width": 360, "height": 780}).new_page()
        page.set_default_timeout(PATIENCE)
        for name in ("", "files", "review", "quality", "models", "nowhere"):
            page.goto(f"{desk.url}/{name}")
            page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
            check_accessible(page)

        # A job whose process this test plays.
        with results.desk.store.write() as db:
            values = "VALUES ('retrain', '[]', '{}', 'li', 'running', 1.0)"
            job = db.execute(f"INSERT INTO jobs (kind, commands, detail, person, state, at) {values}").lastrowid
        heard, stop = page.locator("#announce"), page.get_by_role("button", name="Stop")
        page.goto(f"{desk.url}/models")
        expect(heard).to_have_text("Retraining", timeout=PATIENCE)
        page.get_by_label("Canary, in percent of the requests").fill("25")
        stop.focus()
        progress = folder / "desk" / "jobs" / str(job) / "progress"
        progress.parent.mkdir(parents=True)
        progress.write_text(json.dumps({"what": "reading", "done": 30, "total": 50}), "utf-8")
        expect(heard).to_have_text("Retraining: 50%", timeout=PATIENCE)  # not each step
        expect(stop).to_be_focused()  # although it is renewed every second
        check_heard(page)
        with results.desk.store.write() as db:
            db.execute("UPDATE jobs SET state = 'failed', error = 'no space is left' WHERE id = ?", (job,))
        expect(page.get_by_role("alert").filter(has_text="no space is left")).to_be_visible(timeout=PATIENCE)
        expect(heard).to_have_text("Retraining: failed", timeout=PATIENCE)
        expect(page.get_by_label("Canary, in percent of the requests")).to_have_value("25")  # the page was loaded again
