"""The desk's frame: people, forged requests, files, jobs and languages. The pages have tests of their own."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from aisle.client import Classifier, TrafficLog
from aisle.deploy.desk import languages, users
from aisle.deploy.desk.desk import DeskOptions
from aisle.deploy.desk.jobs import Jobs
from aisle.deploy.desk.pages import files
from aisle.deploy.desk.store import Store, events
from aisle.deploy.desk.users import TRIES, Users
from aisle.preprocess.tables.table import read_rows
from aisle.train.adapt.drift import LEAST_WINDOW

from .conftest import Server, aisle, wait_for
from .desk import DeskClient, desk_client, running_desk

ROOT = Path(__file__).parent.parent / "deploy" / "desk"
PASSWORD = "correct horse battery"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[DeskClient]:
    """A desk whose server is down."""
    with desk_client(tmp_path / "desk") as each:
        yield each


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[DeskClient]:
    """A desk with one person, who is not logged in."""
    Users(tmp_path / "desk" / "users.json").set_password("李雷", PASSWORD)
    with desk_client(tmp_path / "desk") as each:
        yield each


def log_in(client: DeskClient, name: str = "李雷", password: str = PASSWORD) -> None:
    answer = client.act("/login", name=name, password=password)
    assert answer.headers["hx-redirect"] == "/"


# People


def test_without_people_this_machine_needs_no_login(client: DeskClient) -> None:
    assert client.get("/").status_code == 200


@pytest.mark.parametrize("path", ["/", "/files", "/review", "/models", "/jobs/1"])
def test_with_people_every_page_needs_a_login(guarded: DeskClient, path: str) -> None:
    answer = guarded.get(path)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    answer = guarded.get(path, headers={"HX-Request": "true"})
    assert (answer.status_code, answer.headers["hx-redirect"]) == (401, "/login")


def test_a_person_logs_in_and_out(guarded: DeskClient) -> None:
    log_in(guarded)
    assert "李雷" in guarded.get("/").text
    cookie = guarded.cookies["aisle_desk"]
    guarded.act("/logout")
    assert guarded.get("/").status_code == 303
    guarded.cookies.set("aisle_desk", cookie, domain="localhost.local")  # as who had stolen it
    assert guarded.get("/").status_code == 303


def test_who_logs_in_goes_on_with_the_page(guarded: DeskClient) -> None:
    guarded.get("/review")
    answer = guarded.act("/login", name="李雷", password=PASSWORD)
    assert answer.headers["hx-redirect"] == "/review"


def test_wrong_passwords_are_refused_and_then_slowed_down(guarded: DeskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "TRY_SECONDS", 3600.0)  # however slow this machine is
    assert guarded.token  # all requests belong to one session
    for name in ("李雷", "nobody"):
        with ThreadPoolExecutor(4) as pool:  # many at a time are no more than one after the other
            tries = [pool.submit(guarded.act, "/login", name=name, password="wrong password") for _ in range(2 * TRIES)]
        assert sorted(each.result().status_code for each in tries) == [403] * TRIES + [429] * TRIES
        answer = guarded.act("/login", name=name, password=PASSWORD)
        assert (answer.status_code, "Try again in" in answer.text) == (429, True)


def test_who_is_removed_or_changes_the_password_is_logged_out(guarded: DeskClient) -> None:
    people = guarded.desk.users
    log_in(guarded)
    people.set_password("李雷", "another password")
    assert guarded.get("/").status_code == 303
    log_in(guarded, password="another password")
    people.set_password("韩梅梅", PASSWORD)
    people.remove("李雷")
    assert guarded.get("/").status_code == 303


def test_the_file_of_people_is_private_and_holds_no_password(tmp_path: Path) -> None:
    path = tmp_path / "users.json"
    Users(path).set_password("li", PASSWORD)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert PASSWORD not in path.read_text("utf-8")
    assert Users(path).check("li", PASSWORD)
    assert not Users(path).check("li", PASSWORD + " ")


def desk_user(folder: Path, *words: str, password: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aisle", "desk-user", *words, "--folder", str(folder), "--json"]
    return subprocess.run(command, input=f"{password}\n", capture_output=True, text=True, check=False)


def test_desk_user_adds_and_removes_people(tmp_path: Path) -> None:
    assert json.loads(desk_user(tmp_path, "li", password=PASSWORD).stdout)["people"] == ["li"]
    assert json.loads(desk_user(tmp_path, "li", "--remove").stdout)["people"] == []
    for words, password, told in (
        (("li",), "short", "too short"),
        (("l i",), PASSWORD, "is no name"),
        (("li", "--remove"), "", "nobody is called"),
    ):
        done = desk_user(tmp_path, *words, password=password)
        assert (done.returncode, done.stderr.count("\n"), told in done.stderr) == (2, 1, True)


def test_where_others_reach_it_people_are_needed(tmp_path: Path) -> None:
    done = aisle("desk", "--host", "0.0.0.0", "--folder", tmp_path / "desk")
    assert (done.returncode, "aisle desk-user NAME" in done.stderr) == (2, True)
    assert DeskOptions("", tmp_path, "0.0.0.0").loopback is False
    assert all(DeskOptions("", tmp_path, host).loopback for host in ("127.0.0.1", "localhost", "::1"))


# Forged requests


def test_a_request_without_the_token_of_the_page_is_refused(client: DeskClient) -> None:
    token = client.token
    for headers in ({}, {"X-CSRF-Token": "x"}, {"X-CSRF-Token": token, "Origin": "http://evil.example"}):
        assert client.post("/language", data={"language": "zh"}, headers=headers).status_code == 403
    assert client.post("/language", data={"language": "zh"}, headers={"X-CSRF-Token": token}).status_code == 200


def test_a_name_that_points_here_is_refused(client: DeskClient) -> None:
    """DNS rebinding: another site's name can have the address 127.0.0.1."""
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 421


def test_browsers_load_nothing_from_elsewhere(client: DeskClient) -> None:
    for path in ("/", "/files", "/nowhere", "/static/desk.js"):
        answer = client.get(path)
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert not re.findall(r"(?:src|href)=.?https?:|style=", answer.text)


# Errors


def test_a_server_that_is_down_is_a_sentence(client: DeskClient) -> None:
    answer = client.act("/try", text="苹果")
    assert (answer.status_code, "No server answers" in answer.text) == (503, True)


@pytest.mark.parametrize(
    "path", ["/nowhere", "/files/99", "/files/x", "/jobs/99", "/files/1/result", f"/files/{10**20}"]
)
def test_an_address_of_nothing_is_a_sentence(client: DeskClient, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, 'class="problem"' in answer.text) == (404, True)


# Files


def upload(client: DeskClient, content: bytes, name: str = "a.csv") -> str:
    answer = client.act(f"/files?name={quote(name)}", content)
    assert answer.status_code == 200, answer.text
    return str(answer.headers["hx-redirect"])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.exe", b"text\nx\n", "no table"),
        ("", b"text\nx\n", "no table"),
        ("a.csv", b"", "empty"),
    ],
)
def test_an_upload_that_is_no_table_is_refused(client: DeskClient, name: str, content: bytes, told: str) -> None:
    answer = client.act(f"/files?name={name}", content)
    assert (answer.status_code, told in answer.text) == (422, True)
    assert "a.csv" not in client.get("/files").text


def test_an_upload_over_the_limit_is_refused_before_it_comes(client: DeskClient) -> None:
    headers = {"X-CSRF-Token": client.token, "Content-Length": str(2 * 2**30)}
    answer = client.post("/files?name=a.csv", content=b"text\n", headers=headers)
    assert (answer.status_code, "too large" in answer.text) == (413, True)


def test_an_upload_that_grows_over_the_limit_leaves_nothing(
    client: DeskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LARGEST", 1)
    parts = iter([b"text\n"] + [b"x" * 2**16] * 20)
    answer = client.post("/files?name=a.csv", content=parts, headers={"X-CSRF-Token": client.token})
    assert (answer.status_code, "too large" in answer.text) == (413, True)
    assert list((client.desk.options.folder / "files").glob("*")) == []


def test_the_name_of_an_upload_leads_nowhere_else(client: DeskClient) -> None:
    address = upload(client, b"text\nx\n", "../../../x.csv")
    assert ">x.csv<" in client.get(address).text
    assert [each.name for each in (client.desk.options.folder / "files").glob("*/*")] == ["source.csv"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.parquet", b"no parquet", "a.parquet"),
        ("a.csv", b"a,a\n1,2\n", "a.csv"),
        ("a.csv", b"text\n", "no rows"),
        ("a.xlsx", b"PK\x03\x04 broken", "a.xlsx"),
    ],
)
def test_a_table_that_cannot_be_read_says_why(client: DeskClient, name: str, content: bytes, told: str) -> None:
    page = client.get(upload(client, content, name)).text
    (sentence,) = re.findall(r'class="problem" role="alert">([^<]*)<', page)
    assert told in sentence
    assert str(client.desk.options.folder) not in sentence


def test_markup_in_a_table_is_shown_as_text(client: DeskClient) -> None:
    page = client.get(upload(client, b"<b>x</b>\n<script>alert(1)</script>\n", "<i>.csv")).text
    assert "&lt;script&gt;" in page
    assert not re.findall(r"<script>|<b>x|<i>", page)


def test_the_likely_column_is_chosen() -> None:
    rows = [{"id": "12345678901234567890", "标题": "苹果", "note": "a long note about it"}]
    assert files._likely(list(rows[0]), rows) == "标题"
    assert files._likely(["a", "b"], [{"a": "1", "b": "usb cable"}]) == "b"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"column": "text", "format": ".csv", "reviewed": "10"}, "no column text"),
        ({"column": "1", "format": ".csv", "reviewed": "10"}, "no column 1"),
        ({"column": "0", "format": ".exe", "reviewed": "10"}, "format"),
        ({"column": "0", "format": ".csv", "reviewed": "-1"}, "from 0 to"),
        ({"column": "0", "format": ".csv", "reviewed": "x"}, "from 0 to"),
    ],
)
def test_a_wrong_choice_is_a_sentence(client: DeskClient, fields: dict[str, str], told: str) -> None:
    answer = client.act(f"{upload(client, TABLE)}/classify", None, **fields)
    assert (answer.status_code, told in answer.text) == (422, True)


TABLE = b"text\nusb c cable\n"


def test_a_table_is_classified_with_counts_and_errors(server: Server, tmp_path: Path) -> None:
    texts = ["usb c cable 2m", "", "红富士苹果 5斤装", "<script>alert(1)</script>", "运动鞋 男款"]
    table = io.StringIO()
    csv.writer(table).writerows([["id", "title"], *enumerate(texts)])
    with desk_client(tmp_path / "desk", server.url) as client:
        address = upload(client, table.getvalue().encode(), "catalogue.csv")
        done = client.act(f"{address}/classify", column="1", format=".xlsx", reviewed="3")
        assert done.headers["hx-redirect"] == address
        assert client.act(f"{address}/classify", column="1", format=".csv").status_code == 409
        wait_for(lambda: "Download the result" in client.get(address).text)
        page = client.get(address).text
        assert "2 rows with errors" in page
        answer = client.get(f"{address}/result")
        assert "catalogue-classified.xlsx" in answer.headers["content-disposition"]
        out = tmp_path / "result.xlsx"
        out.write_bytes(answer.content)
        rows = list(read_rows(out))
        assert [row["title"] or "" for row in rows] == texts
        assert [bool(row["error"]) for row in rows] == [False, True, False, True, False]
        with client.desk.store.read() as db:
            assert db.execute("SELECT count(*) FROM items").fetchone()[0] == 3
        client.act(f"{address}/delete")
        assert client.get(address).status_code == 404


def test_a_job_that_was_stopped_can_be_started_again(client: DeskClient) -> None:
    address = upload(client, TABLE)
    client.act(f"{address}/classify", column="0", format=".csv", reviewed="0")
    client.act("/jobs/1/stop")
    client.act("/jobs/2/stop")  # there is none
    wait_for(lambda: not client.desk.jobs.get(1).active)  # type: ignore[union-attr]
    page = client.get(address).text
    assert "Stopped." in page
    with client.desk.store.read() as db:
        assert [each["what"] for each in events(db)] == ["stop", "classify", "upload"]
    assert "Try again" in page
    assert client.act(f"{address}/classify", column="0", format=".csv").status_code == 200
    client.act("/jobs/2/stop")


def classified(client: DeskClient, content: bytes, name: str = "a.csv", column: str = "0") -> str:
    """Upload and classify a table; return its page."""
    address = upload(client, content, name)
    assert client.act(f"{address}/classify", column=column, format=".csv", reviewed="5").status_code == 200
    wait_for(lambda: "Download the result" in client.get(address).text)
    return str(client.get(address).text)


def queued(client: DeskClient) -> list[str]:
    with client.desk.store.read() as db:
        return sorted(row["text"] for row in db.execute("SELECT text FROM items"))


@pytest.mark.parametrize("name", ["category", "error", "decision", " text  name\nof it "])
def test_the_text_column_may_have_any_name(server: Server, tmp_path: Path, name: str) -> None:
    """Also that of an added column, whose texts would be the model's answers, and one with spaces and line breaks."""
    table = io.StringIO()
    csv.writer(table).writerows([[name, "id"], ["usb c cable", "1"], ["红富士苹果", "2"]])
    with desk_client(tmp_path / "desk", server.url) as client:
        classified(client, table.getvalue().encode())
        assert queued(client) == ["usb c cable", "红富士苹果"]


def test_a_table_of_errors_alone_has_a_result(server: Server, tmp_path: Path) -> None:
    with desk_client(tmp_path / "desk", server.url) as client:
        assert "2 rows with errors" in classified(client, b'text,id\n"",1\n<br>,2\n')
        assert queued(client) == []


def test_a_table_in_gbk_is_read_and_the_page_says_so(server: Server, tmp_path: Path) -> None:
    content = "标题,编号\n红富士苹果 新鲜脆甜,1\n".encode("gbk")
    with desk_client(tmp_path / "desk", server.url) as client:
        page = client.get(upload(client, content)).text
        assert "红富士苹果" in page
        assert "not in UTF-8" in page
        classified(client, content)
        assert queued(client) == ["红富士苹果 新鲜脆甜"]


def test_half_of_a_pair_of_surrogates_is_shown(client: DeskClient) -> None:
    page = client.get(upload(client, b'{"text": "\\ud83d apple"}\n', "a.jsonl"))
    assert (page.status_code, "? apple" in page.text) == (200, True)


def test_a_folder_that_was_moved_still_has_its_files(server: Server, tmp_path: Path) -> None:
    with desk_client(tmp_path / "desk", server.url) as client:
        classified(client, TABLE)
    (tmp_path / "desk").rename(tmp_path / "moved")
    with desk_client(tmp_path / "moved", server.url) as client:
        assert client.get("/files/1/result").status_code == 200


def test_an_upload_that_a_kill_cut_off_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "desk" / "files" / "1"
    with desk_client(tmp_path / "desk") as client, client.desk.store.write() as db:
        db.execute("INSERT INTO files (name, source, person, at) VALUES ('a.csv', '', 'li', 0)")
    folder.mkdir(parents=True)
    with desk_client(tmp_path / "desk"):
        assert not folder.exists()


# Drift


@pytest.mark.long
def test_the_drift_of_real_traffic_is_shown_over_time(
    server: Server, checkpoint: Path, sample: Path, tmp_path: Path
) -> None:
    """Usual traffic first, then one product alone. `aisle classify` and a client write the log."""
    log, usual = tmp_path / "traffic.jsonl", tmp_path / "usual.csv"
    usual.write_text("".join(sample.read_text("utf-8").splitlines(keepends=True)[:1001]), "utf-8")
    done = aisle("classify", usual, "-o", tmp_path / "out.csv", "--url", server.url, "--log", log)
    assert done.returncode == 0, done.stderr
    with desk_client(tmp_path / "desk", server.url, checkpoint=checkpoint, log=log) as client:
        rows = measured_drift(client)
        assert "No need to retrain." in client.get("/quality").text
        with TrafficLog(log) as traffic, Classifier(server.url, timeout=60, log=traffic) as classifier:
            classifier.classify([f"红富士苹果 {i}斤装" for i in range(800)])
        assert measured_drift(client) == rows + 800
        page = client.get("/quality").text
        assert '<strong class="warn">Retrain.</strong>' in page
        assert "mix of the predicted categories" in page
        (course, history) = re.findall(r"<details><summary>As a table</summary>(.*?)</details>", page, re.S)
        assert course.count("<tr>") == 1 + (rows + 800) // LEAST_WINDOW
        assert [each in history for each in ("<td>Retrain.</td>", "<td>No need to retrain.</td>")] == [True, True]
        for name in ("drift", "drift-history"):
            assert f'src="/quality/{name}.svg"' in page
            assert client.get(f"/quality/{name}.svg").text.count("<path") > 20


def measured_drift(client: DeskClient) -> int:
    """Look for drift; return the number of answers."""
    assert client.act("/quality/drift").status_code == 200
    job = wait_for(lambda: (each := client.desk.jobs.last("drift")) and not each.active and each, 300)
    assert job.results, job.error
    return int(job.results[0]["rows"])


# Kills


@pytest.mark.long
def test_a_desk_that_is_killed_loses_no_row(server: Server, classifier: Classifier, tmp_path: Path) -> None:
    """It is killed while a table is classified. The next start completes the table."""
    folder, texts = tmp_path / "desk", [f"killed desk {i} 苹果" for i in range(2000)]
    classifier.probe(decisions=True)  # the cache answers this later, while the encoder is held
    with running_desk(folder, server.url) as desk:
        store = Store(folder / "desk.sqlite")
        source, out = (folder / "files" / "1" / name for name in ("source.csv", "result.csv"))
        source.parent.mkdir(parents=True)
        source.write_text("\n".join(["text", *texts]), "utf-8")
        with server.held(), store.write() as db:
            command = ["classify", str(source), "-o", str(out), "--url", server.url]
            job = Jobs(store, folder / "jobs").add(db, "classify", [command], "li", file="a", number=1, reviewed=0)
            db.execute(
                "INSERT INTO files (name, source, person, at, text_column, output, job) "
                "VALUES ('a', ?, 'li', 0, 'text', ?, ?)",
                (str(source), str(out), job),
            )
            db.commit()
            wait_for(out.with_name("result.csv.partial").exists)
            desk.process.send_signal(signal.SIGKILL)
            desk.process.wait()
            db.execute("BEGIN")
    with running_desk(folder, server.url):
        jobs = Jobs(store, folder / "jobs")
        wait_for(lambda: jobs.get(job).state == "done")  # type: ignore[union-attr]
    rows = list(read_rows(out))
    assert [row["text"] for row in rows] == texts
    assert all(row["category"] for row in rows)


def test_a_rollout_that_was_cut_off_is_not_started_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "desk.sqlite")
    jobs = Jobs(store, tmp_path)
    with store.write() as db:
        job = jobs.add(db, "deploy", [["deploy"]], "li")
        db.execute("UPDATE jobs SET state = 'running'")
    jobs.start()
    jobs.stop()
    found = jobs.get(job)
    assert found is not None
    assert (found.state, "which version is live" in str(found.error)) == ("failed", True)


# Languages


def sentences() -> set[str]:
    """Return what the pages say, in templates and in the code's problems."""
    found: set[object] = set()
    for template in (ROOT / "templates").glob("*.html"):
        found.update(re.findall(r'_\("([^"]+)"', template.read_text("utf-8")))
    for module in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Problem":
                found.update(each.value for each in ast.walk(node.args[0]) if isinstance(each, ast.Constant))
    return {each for each in found if isinstance(each, str) and re.sub(r"{\w+}", "", each)}


def test_every_sentence_is_translated_with_the_same_values() -> None:
    for name in set(languages.NAMES) - {"en"}:
        known = languages.translations(name)
        assert sentences() - known.keys() == set()
        for text, translated in known.items():
            assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", translated)), text


@pytest.mark.parametrize(
    ("accepted", "language"),
    [("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("de, en;q=0.5, zh;q=0.7", "zh"), ("fr", "en"), ("", "en"), ("zh;q=x", "en")],
)
def test_the_browser_chooses_the_language(client: DeskClient, accepted: str, language: str) -> None:
    assert f'<html lang="{language}">' in client.get("/", headers={"Accept-Language": accepted}).text


def test_a_person_chooses_the_language(client: DeskClient) -> None:
    client.act("/language", language="zh")
    assert '<html lang="zh">' in client.get("/").text
    assert client.act("/language", language="xx").status_code == 422
