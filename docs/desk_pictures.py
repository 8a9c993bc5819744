"""Draw the manual's pictures of the desk: start a server and a desk on what `aisle demo` made, and visit each page.

python docs/desk_pictures.py docs/_static/desk
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import uvicorn
from playwright.sync_api import Page, sync_playwright

from aisle.deploy.desk.app import create_app
from aisle.deploy.desk.desk import Desk, DeskOptions
from aisle.deploy.rest.server import listen
from aisle.deploy.server.triton import ServerOptions, free_ports, running
from aisle.preprocess.tables.table import read_rows

CHECKPOINT, REPOSITORY = Path("work/sample-16000"), Path("model_repository")
DATA = CHECKPOINT.with_suffix(".csv")
ROWS = 1000
PATIENCE = 600_000  # milliseconds


@contextmanager
def desk(folder: Path) -> Iterator[str]:
    """Run Triton and a desk; yield the desk's address."""
    repository = folder / "repository"
    shutil.copytree(REPOSITORY, repository)
    grpc, metrics, port = free_ports(3)
    options = DeskOptions(
        f"localhost:{grpc}", folder, port=port, repository=repository, checkpoint=CHECKPOINT, data=DATA
    )
    with (
        (folder / "log").open("wb") as log,
        running(ServerOptions(repository, grpc_port=grpc, metrics_port=metrics), log),
    ):
        server = uvicorn.Server(uvicorn.Config(create_app(Desk(options)), log_level="warning"))
        thread = Thread(target=server.run, kwargs={"sockets": [listen(options.host, port)]})
        thread.start()
        try:
            yield f"http://localhost:{port}"
        finally:
            server.should_exit = True
            thread.join()


def visit(page: Page, url: str, table: Path, out: Path) -> None:
    """Go the way of a catalogue team, and keep a picture of each page."""

    def keep(name: str) -> None:
        page.screenshot(path=out / f"{name}.png")

    page.goto(url)
    page.get_by_label("Text of a product").fill("红富士苹果 5斤装 新鲜脆甜")
    page.get_by_role("button", name="Classify").click()
    page.locator("mark").first.wait_for()
    keep("try")
    page.goto(f"{url}/files")
    page.get_by_label("A table").set_input_files(table)
    page.get_by_role("button", name="Upload").click()
    page.get_by_role("button", name="Classify").click()
    page.get_by_role("link", name="Download the result").wait_for()
    keep("file")
    page.goto(f"{url}/review")
    for _ in range(12):
        page.locator("#review mark").first.wait_for()
        keep("review")
        page.wait_for_timeout(300)  # the page ignores keys at first, so that a double press labels one text
        page.keyboard.press("2")
        page.locator("#review .good").wait_for()
    page.goto(f"{url}/quality")
    page.get_by_role("button", name="Measure").click()
    page.get_by_role("heading", name="Confusions").wait_for()
    page.locator(".chart").evaluate_all("charts => Promise.all(charts.map(chart => chart.decode()))")  # all are drawn
    keep("quality")
    page.goto(f"{url}/models")
    keep("models")


def draw(out: Path) -> None:
    """Write the pictures. They show SYNTHETIC titles."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        table = folder / "catalogue.csv"
        texts = [row["text"] for row, _ in zip(read_rows(DATA), range(ROWS), strict=False)]
        with table.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["title"], *([text] for text in texts)])
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(locale="en-US", viewport={"width": 900, "height": 1000})
        page.set_default_timeout(PATIENCE)
        with desk(folder) as url:
            visit(page, url, table, out)
        browser.close()
    print(json.dumps({"pictures": sorted(each.name for each in out.glob("*.png"))}))


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
