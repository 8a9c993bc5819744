"""Data contracts: a table keeps its own, each fault is told, and `aisle watch` tells it to others."""

from __future__ import annotations

import csv
import datetime
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aisle.errors import InputError
from aisle.preprocess.contract import (
    CategoryRule,
    ColumnRule,
    Contract,
    FreshnessRule,
    check,
    date_of,
    propose,
    read_contract,
    write_contract,
)

from .conftest import Server, aisle

TODAY = datetime.datetime(2026, 11, 28, tzinfo=datetime.UTC)
Row = dict[str, Any]
NAMES = ("水果 > 苹果", "日化 > 牙膏")


def rows_of(count: int = 20) -> list[Row]:
    """Return rows of two categories, one of them a day old."""
    return [
        {"text": f"text {n}", "category": NAMES[n % 2], "price": f"{n}.5", "updated": "2026-11-27", "shop": ""}
        for n in range(count)
    ]


def write(path: Path, rows: list[Row]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
        return path
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def contract(tmp_path: Path) -> Contract:
    return propose(write(tmp_path / "first.csv", rows_of()), "category", TODAY)


def test_a_proposal_is_what_the_table_holds(contract: Contract) -> None:
    assert contract == Contract(
        rows_at_least=10,
        columns={
            "text": ColumnRule("text", 0.01),
            "category": ColumnRule("text", 0.01),
            "price": ColumnRule("number", 0.01),
            "updated": ColumnRule("date", 0.01),
            "shop": ColumnRule("any", 1.0),
        },
        categories=CategoryRule("category", dict.fromkeys(NAMES, 0.5), 0.0, 0.2),
        freshness=FreshnessRule("updated", 7),
    )


def test_a_table_keeps_its_own_contract_in_every_format(tmp_path: Path) -> None:
    for name in ("table.csv", "table.jsonl"):
        table, file = write(tmp_path / name, rows_of()), tmp_path / "contract.toml"
        made = propose(table, "category", TODAY)
        write_contract(made, file, table.name)
        assert read_contract(file) == made
        assert check(made, table, TODAY) == []


@given(st.dictionaries(st.text(), st.floats(0, 1), min_size=1), st.text())
def test_any_name_can_be_written_and_read(
    tmp_path_factory: pytest.TempPathFactory, shares: dict[str, float], column: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "names.toml"
    made = Contract(1, {column: ColumnRule()}, CategoryRule(column, shares))
    try:
        write_contract(made, file, "a.csv")
    except UnicodeEncodeError:  # half of a surrogate pair, which no table holds
        return
    assert read_contract(file) == made


def changed(change: Callable[[list[Row]], Any]) -> list[Row]:
    rows = rows_of()
    change(rows)
    return rows


def drop(name: str) -> Callable[[list[Row]], Any]:
    return lambda rows: [row.pop(name) for row in rows]


def fill(name: str, value: str, places: range = range(20)) -> Callable[[list[Row]], Any]:
    return lambda rows: [rows[place].update({name: value}) for place in places]


FAULTS: list[tuple[Callable[[list[Row]], Any], list[str]]] = [
    (lambda rows: rows.__delitem__(slice(8, 20)), ["8 rows, fewer than 10"]),
    (drop("price"), ["no column 'price'"]),
    (drop("shop"), []),  # it may be missing from every row
    (fill("text", " ", range(3)), ["column 'text': 15.00% of the values are missing, more than 1.00%"]),
    (fill("price", "three", range(4, 6)), ["column 'price': 2 values are no number, such as 'three' in row 5"]),
    (fill("category", "鞋", range(7, 8)), ["1 rows have a category that is not listed, such as '鞋' in row 8"]),
    (
        fill("category", NAMES[0], range(1, 12)),
        [
            "the shares of the categories are 0.30 apart, more than 0.2; "
            "'水果 > 苹果' has 80.0% of the rows instead of 50.0%"
        ],
    ),
    (fill("updated", "2026-11-01"), ["the newest updated is 2026-11-01, more than 7 days ago"]),
    (
        fill("updated", ""),
        [
            "column 'updated': 100.00% of the values are missing, more than 1.00%",
            "column 'updated' has no date",
        ],
    ),
]


@pytest.mark.parametrize(("change", "faults"), FAULTS)
def test_each_fault_is_told(
    change: Callable[[list[Row]], Any], faults: list[str], contract: Contract, tmp_path: Path
) -> None:
    assert check(contract, write(tmp_path / "later.csv", changed(change)), TODAY) == faults


def test_dates_of_every_form() -> None:
    noon = datetime.datetime(2026, 11, 28, 12, tzinfo=datetime.UTC)
    for value in ("2026-11-28T12:00:00Z", "2026-11-28 20:00+08:00", noon, noon.replace(tzinfo=None)):
        assert date_of(value) == noon
    assert date_of(datetime.date(2026, 11, 28)) == noon.replace(hour=0)
    for other in ("28.11.2026", "20261128", 20261128, None, "0001-01-01T00:00:00+08:00"):
        assert date_of(other) is None


def test_lists_of_categories_are_counted_one_by_one(tmp_path: Path) -> None:
    table = write(tmp_path / "sets.jsonl", [{"text": "a", "category": ["x", "y"]}, {"text": "b", "category": ["x"]}])
    made = propose(table, "category", TODAY)
    assert made.columns["category"].type == "list"
    assert made.categories
    assert made.categories.shares == {"x": pytest.approx(2 / 3, abs=1e-6), "y": pytest.approx(1 / 3, abs=1e-6)}
    assert check(made, table, TODAY) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rows_at_least = ", "is not a contract"),
        ("rows = 3", "there is no entry rows; known are rows_at_least, columns, categories, freshness"),
        ("rows_at_least = true", "rows_at_least is True; give a whole number"),
        ("[columns.text]\ntype = 'word'", "columns.text: there is no type 'word'; choose from date, number"),
        ("[columns]\ntext = 3", r"\[columns.text\] is not a table"),
        ("[freshness]\ncolumn = 'a'", "freshness.days is missing"),
        ("[categories]\ncolumn = 'a'\nshares = ['x']", "categories.shares must give each category's share"),
    ],
)
def test_a_wrong_contract_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "contract.toml"
    file.write_text(text, "utf-8")
    with pytest.raises(InputError, match=complaint):
        read_contract(file)


def test_a_table_that_breaks_its_contract_is_not_read(tmp_path: Path) -> None:
    table, file = write(tmp_path / "first.csv", rows_of()), tmp_path / "contract.toml"
    done = aisle("clean", table, "-o", tmp_path / "clean.csv", "--propose-contract", file)
    assert done.returncode == 0, done.stderr
    later = write(tmp_path / "later.csv", [{**row, "category": "鞋"} for row in rows_of(4)])
    for command in (("train", later), ("pretrain", table, later), ("clean", later)):
        refused = aisle(*command, "-o", tmp_path / "out", "--contract", file)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1] == (
            f"aisle: {later} breaks {file}: 4 rows, fewer than 10 (2 more: aisle watch {later} --contract {file})"
        )
        assert not (tmp_path / "out").exists()


@pytest.fixture
def hook() -> Iterator[tuple[str, list[Any]]]:
    """An address that keeps the messages; /down refuses them."""
    received: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response({"/down": 500, "/moved": 302}.get(self.path, 200))
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()
        thread.join()


def test_all_checks_are_made_and_failures_are_told(
    server: Server, checkpoint: Path, sample: Path, tmp_path: Path, hook: tuple[str, list[Any]]
) -> None:
    file, log = tmp_path / "contract.toml", tmp_path / "traffic.jsonl"
    assert aisle("clean", sample, "-o", tmp_path / "clean.csv", "--propose-contract", file).returncode == 0
    log.write_text('{"time": "2026-11-28T00:00:00Z", "category": "x", "confidence": 0.5, "length": 3}\n', "utf-8")
    checks = ["--checkpoint", checkpoint, "--log", log, "--labels", sample, "--accuracy-at-least", 1]
    command = ["watch", sample, "--contract", file, *checks, "--url", server.url, "--webhook", hook[0], "--json"]
    done = aisle(*command)
    assert done.returncode == 3, done.stderr
    result = json.loads(done.stdout)
    contract, drift, accuracy = result["checks"]
    assert (contract["check"], contract["ok"], contract["reasons"]) == ("contract", True, [])
    assert drift["reasons"][0].startswith("not checked: ")  # one answer is too few, and the next check is made
    assert accuracy["accuracy"] < 1
    assert accuracy["reasons"][0].endswith("is below 1.0 by more than chance explains")
    (told,) = hook[1]
    assert told.pop("text").splitlines() == [
        "aisle watch",
        f"drift: {drift['reasons'][0]}",
        f"accuracy: {accuracy['reasons'][0]}",
    ]
    assert told == result


def test_what_is_well_is_told_to_nobody(tmp_path: Path, hook: tuple[str, list[Any]]) -> None:
    table, file = write(tmp_path / "first.csv", rows_of()), tmp_path / "contract.toml"
    write_contract(Contract(3), file, table.name)
    done = aisle("watch", table, "--contract", file, "--webhook", hook[0])
    assert (done.returncode, done.stdout, hook[1]) == (0, "contract: ok\n", [])


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("/down", "the webhook answered 500"),
        ("", "cannot be reached"),
        ("/moved", "the webhook answered 302"),
    ],
)
def test_a_webhook_that_fails_is_told(path: str, complaint: str, tmp_path: Path, hook: tuple[str, list[Any]]) -> None:
    table, file = write(tmp_path / "first.csv", rows_of()), tmp_path / "contract.toml"
    write_contract(Contract(30), file, table.name)
    url = f"{hook[0]}{path}" if path else "http://127.0.0.1:9"
    done = aisle("watch", table, "--contract", file, "--webhook", url)
    assert done.returncode == 1
    assert "20 rows, fewer than 30" in done.stdout
    assert complaint in done.stderr
    assert url not in done.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "nothing to check; give DATA --contract, --checkpoint --log, or --labels --accuracy-at-least"),
        (("--log", "a.jsonl"), "--log needs --checkpoint too"),
        (("--labels", "a.csv"), "--labels needs --accuracy-at-least too"),
        (("a.csv",), "DATA needs --contract too"),
        (("--checkpoint", "c", "--log", "l", "--url", "x:1"), "--url: needs --labels"),
    ],
)
def test_half_a_check_is_refused(words: tuple[str, ...], complaint: str) -> None:
    done = aisle("watch", *words)
    assert (done.returncode, done.stderr) == (2, f"aisle: {complaint}\n")


def test_what_would_fail_only_later_is_refused_before_the_checks(tmp_path: Path) -> None:
    """A webhook with a wrong address is noticed on the first run, and not when a check fails."""
    table = tmp_path / "table.csv"
    table.write_text("text,category\na,b\nc,d\n")
    contract = tmp_path / "contract.toml"
    contract.write_text("")
    done = aisle("watch", table, "--contract", contract, "--webhook", "ftp://shop/hook")
    assert done.returncode == 2
    assert "--webhook takes an address that starts with https:// or http://" in done.stderr


@pytest.mark.parametrize("option", ["--propose-contract", "--log"])
def test_what_is_no_table_is_not_written_to_standard_output(option: str, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("text,category\na,b\n")
    command = "clean" if option == "--propose-contract" else "classify"
    done = aisle(command, table, "-o", tmp_path / "out.csv", option, "-")
    assert (done.returncode, done.stderr) == (
        2,
        f"aisle: {option} -: this is not written to standard output; name a file\n",
    )
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty, so it checks nothing"),
        ("[columns.text]\nmissing_at_most = 87", "columns.text.missing_at_most is 87; give a share from 0 to 1"),
        ('[categories]\ncolumn = "c"\napart_at_most = nan\n[categories.shares]\na = 1.0', "is nan; give a share"),
        ("rows_at_least = -5", "rows_at_least is -5; give a number of 0 or more"),
        ("rows_at_least = 1e9", "rows_at_least is 1000000000.0; give a whole number"),
        ('[freshness]\ncolumn = "t"\ndays = inf', "freshness.days is inf; give a number of 0 or more"),
        ('[categories]\ncolumn = "c"\n[categories.shares]\na = 50', "each category's share of the rows, from 0 to 1"),
        ('[categories]\ncolumn = "c"\n[categories.shares]\na = -0.1', "each category's share of the rows, from 0 to 1"),
    ],
)
def test_a_limit_that_could_never_fail_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "contract.toml"
    path.write_text(text, "utf-8-sig")
    with pytest.raises(InputError, match=re.escape(complaint)):
        read_contract(path)


def test_a_date_in_the_future_does_not_make_a_table_fresh(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("text,t\na,2026-01-01\nb,2027-12-01\n")
    today = datetime.datetime(2026, 11, 28, tzinfo=datetime.UTC)
    contract = Contract(freshness=FreshnessRule("t", 7))
    assert check(contract, table, today) == [
        "column 't': the date 2027-12-01 in row 2 is in the future",
        "the newest t is 2026-01-01, more than 7 days ago",
    ]
    assert check(Contract(freshness=FreshnessRule("x", 7)), table, today) == ["no column 'x'"]


def test_a_contract_without_its_table_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path, texts = tmp_path / "contract.toml", tmp_path / "texts.csv"
    write_contract(Contract(1), path, "x")
    texts.write_text("text\na\n")
    done = aisle("build", checkpoint, "--held-out", texts, "--contract", path, "--repository", tmp_path / "models")
    assert (done.returncode, done.stderr) == (2, "aisle: --contract needs DATA, the table that it checks\n")


def test_a_missing_contract_is_a_failed_check(tmp_path: Path, hook: tuple[str, list[Any]]) -> None:
    table = tmp_path / "table.csv"
    table.write_text("text,category\na,b\n")
    done = aisle("watch", table, "--contract", tmp_path / "gone.toml", "--webhook", hook[0], "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout) == {key: value for key, value in hook[1][0].items() if key != "text"}
    assert "gone.toml" in hook[1][0]["text"]
