"""The review queue, similar rows, the search of categories, and the page's routes, with real SQLite files."""

from __future__ import annotations

import html
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from aisle.deploy.desk import queue
from aisle.deploy.desk.app import create_app
from aisle.deploy.desk.desk import Desk, DeskOptions
from aisle.deploy.desk.errors import Problem
from aisle.deploy.desk.pages import review
from aisle.deploy.desk.queue import LEASE_SECONDS, MOST_PEOPLE, SECOND_OPINIONS, Agreement, Item, Kind
from aisle.deploy.desk.similar import Similar
from aisle.deploy.desk.store import Store, events
from aisle.deploy.desk.typeahead import Catalogue
from aisle.preprocess.clean import content_key

NOW = 1_000_000.0
CABLE, CASE = "数码 > 手机配件 > 数据线", "数码 > 手机配件 > 手机壳"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "desk.sqlite")


def texts(number: int, people: int = 1) -> list[str]:
    """Return texts that are labelled by one person, or by two."""
    found = []
    for count in range(10_000):
        text = f"text {count}"
        if (content_key(text)[0] % SECOND_OPINIONS == 0) == (people == 2):
            found.append(text)
    return found[:number]


def fill(store: Store, names: list[str]) -> None:
    """Add texts; the first is the least certain."""
    step = 0.4 / max(len(names), 1)
    rows = [
        {
            "text": name,
            "category": CABLE,
            "confidence": 0.5 + order * step,
            "category_2": CASE,
            "confidence_2": 0.5 - order * step,
        }
        for order, name in enumerate(names)
    ]
    with store.write() as db:
        assert queue.add(db, 1, rows) == len(names)


def take(store: Store, person: str, now: float = NOW) -> Item | None:
    with store.write() as db:
        return queue.take(db, person, now)


def taken(store: Store, person: str, now: float = NOW) -> Item:
    item = take(store, person, now)
    assert item is not None
    return item


def label(
    store: Store, person: str, *items: int, kind: Kind = "category", category: str | None = CABLE, now: float = NOW
) -> list[int]:
    with store.write() as db:
        return queue.label(db, person, list(items), kind, category, now).items


def undo(store: Store, person: str, now: float = NOW) -> Item | None:
    with store.write() as db:
        return queue.undo(db, person, now)


def read(store: Store, query: str) -> list[tuple[object, ...]]:
    with store.read() as db:
        return [tuple(row) for row in db.execute(query)]


def state(store: Store, item: int) -> tuple[object, ...]:
    return read(store, f"SELECT state, agreed, wanted FROM items WHERE id = {item}")[0]


def set_team(store: Store, *people: str) -> None:
    with store.write() as db:
        queue.set_team(db, people)


def told(store: Store, question: Callable[[sqlite3.Connection], object]) -> object:
    with store.read() as db:
        return question(db)


# Who gets which text


def test_two_people_never_get_the_same_text(store: Store) -> None:
    fill(store, texts(3))
    first, second = taken(store, "ann"), taken(store, "bob")
    assert [first.text, second.text] == texts(3)[:2]
    assert taken(store, "ann") == first  # the page was loaded again
    assert taken(store, "cy").text == texts(3)[2]
    assert take(store, "dan") is None


def test_the_least_certain_text_comes_first(store: Store) -> None:
    rows = [
        {"text": name, "category": CABLE, "confidence": confidence, "confidence_2": second}
        for name, confidence, second in zip(texts(3), (0.9, 0.5, 0.6), (0.05, 0.48, None), strict=True)
    ]
    with store.write() as db:
        queue.add(db, 1, [{**row, "decision": "review"} for row in rows])
    found = []
    while item := take(store, "ann"):
        found.append(item.text)
        assert item.decision == "review"
        label(store, "ann", item.id)
    assert found == [texts(3)[order] for order in (1, 2, 0)]


def test_a_text_goes_to_someone_else_after_its_time(store: Store) -> None:
    fill(store, texts(1))
    item = taken(store, "ann")
    assert take(store, "bob", NOW + LEASE_SECONDS - 1) is None
    assert taken(store, "bob", NOW + LEASE_SECONDS) == item
    assert take(store, "ann", NOW + LEASE_SECONDS) is None
    # It is too late for the first person's answer, which must not count as a second one.
    assert label(store, "ann", item.id, now=NOW + LEASE_SECONDS) == []
    assert label(store, "bob", item.id, now=NOW + LEASE_SECONDS) == [item.id]


def test_a_late_answer_counts_if_nobody_else_has_the_text(store: Store) -> None:
    fill(store, texts(1))
    item = taken(store, "ann")
    assert label(store, "ann", item.id, now=NOW + 10 * LEASE_SECONDS) == [item.id]


def test_loading_the_page_again_renews_the_time(store: Store) -> None:
    fill(store, texts(1))
    taken(store, "ann")
    taken(store, "ann", NOW + LEASE_SECONDS - 1)
    assert take(store, "bob", NOW + LEASE_SECONDS + 1) is None


def test_a_skipped_text_goes_to_others(store: Store) -> None:
    fill(store, texts(2))
    first = taken(store, "ann")
    label(store, "ann", first.id, kind="skip")
    second = taken(store, "ann")
    assert second != first
    assert taken(store, "bob") == first
    label(store, "ann", second.id)
    assert take(store, "ann") is None
    label(store, "bob", first.id, kind="skip")
    with store.write() as db:
        assert queue.progress(db, "ann").skipped == 1
        assert queue.bring_back(db, "ann") == 1
    assert taken(store, "ann") == first
    assert state(store, first.id) == ("open", None, 1)


# What people agree on


def test_one_label_decides_most_texts(store: Store) -> None:
    fill(store, texts(3))
    label(store, "ann", 1)
    label(store, "ann", 2, kind="none")
    assert state(store, 1) == ("agreed", CABLE, 1)
    assert state(store, 2) == ("none", None, 1)
    assert told(store, lambda db: list(queue.corrections(db))) == [
        {"text": texts(3)[0], "correct_category": CABLE},
    ]
    assert read(store, "SELECT text, category FROM items WHERE state = 'none'") == [(texts(3)[1], CABLE)]
    assert label(store, "bob", 1) == []  # no longer open
    assert label(store, "bob", 999) == []


def test_one_text_in_ten_is_for_two_people(store: Store) -> None:
    fill(store, [f"row {number}" for number in range(2000)])
    (share,) = read(store, "SELECT avg(wanted = 2) FROM items")[0]
    assert isinstance(share, float)
    assert 0.07 < share < 0.13  # the keys are hashes, so this is the same on every machine


def test_one_person_alone_waits_for_nobody(store: Store) -> None:
    """Also for the texts that were queued while there were several people."""
    first, second, third = texts(3, people=2)
    fill(store, [first, second])
    label(store, "ann", 1)
    set_team(store, "ann")
    assert state(store, 1) == ("agreed", CABLE, 1)
    assert state(store, 2) == ("open", None, 1)
    fill(store, [third])
    assert state(store, 3) == ("open", None, 1)
    set_team(store, "ann", "bob")
    fill(store, texts(4, people=2)[3:])
    assert state(store, 4) == ("open", None, 2)


def test_two_people_give_second_opinions(store: Store) -> None:
    fill(store, texts(1, people=2))
    assert taken(store, "ann") == taken(store, "bob")  # two different people at once
    assert take(store, "cy") is None
    label(store, "ann", 1)
    assert state(store, 1) == ("open", None, 2)
    assert take(store, "ann") is None
    assert label(store, "ann", 1) == []  # twice the same person are not two people
    with store.read() as db:
        assert queue.progress(db, "ann").waiting == 1
    label(store, "bob", 1)
    assert state(store, 1) == ("agreed", CABLE, 2)


def test_a_third_person_decides_a_dispute(store: Store) -> None:
    fill(store, texts(1, people=2))
    label(store, "ann", 1)
    label(store, "bob", 1, category=CASE)
    assert state(store, 1) == ("open", None, 3)
    assert take(store, "ann") is None
    assert taken(store, "cy").id == 1
    assert take(store, "dan") is None
    label(store, "cy", 1, category=CASE)
    assert state(store, 1) == ("agreed", CASE, 3)


def test_a_dispute_waits_for_nobody_who_is_not_there(store: Store) -> None:
    set_team(store, "ann", "bob", "cy")
    fill(store, texts(1, people=2))
    label(store, "ann", 1)
    label(store, "bob", 1, category=CASE)
    assert state(store, 1) == ("open", None, 3)
    set_team(store, "ann", "bob")
    assert state(store, 1) == ("open", None, 2)
    with store.read() as db:
        progress = queue.progress(db, "ann")
    assert (progress.open, progress.disputed, progress.waiting) == (1, 1, 0)
    set_team(store, "ann")  # has labelled it already
    assert state(store, 1) == ("open", None, 2)
    set_team(store, "dan")
    assert taken(store, "dan").id == 1
    label(store, "dan", 1, category=CASE)
    assert state(store, 1) == ("agreed", CASE, 3)


def test_none_of_these_can_win_a_dispute(store: Store) -> None:
    fill(store, texts(1, people=2))
    label(store, "ann", 1)
    label(store, "bob", 1, kind="none")
    label(store, "cy", 1, kind="none")
    assert state(store, 1) == ("none", None, 3)


def test_a_text_without_a_majority_is_disputed(store: Store) -> None:
    fill(store, texts(1, people=2))
    for number in range(MOST_PEOPLE):
        label(store, f"person {number}", 1, category=f"category {number}")
    assert state(store, 1) == ("open", None, MOST_PEOPLE)
    assert take(store, "one more") is None
    with store.read() as db:
        progress = queue.progress(db, "ann")
    assert (progress.open, progress.disputed, progress.waiting, progress.done) == (1, 1, 0, 0)


def test_agreement_is_that_of_two_people(store: Store) -> None:
    assert told(store, queue.agreement) == Agreement(0, None, None)
    fill(store, texts(12, people=2))
    for item in range(1, 13):
        category = CABLE if item % 2 else CASE
        label(store, "ann", item, category=category)
        label(store, "bob", item, category=CASE if item == 1 else category)
        if item == 9:
            assert told(store, queue.agreement) == Agreement(9, 8 / 9, None)  # too few for kappa
    found = told(store, queue.agreement)
    assert isinstance(found, Agreement)
    assert (found.texts, found.share) == (12, 11 / 12)
    # By hand: 5 and 7 of 12 against 6 and 6 of 12, so chance alone gives one half.
    assert found.kappa == pytest.approx((11 / 12 - 0.5) / 0.5)


def test_kappa_of_one_category_is_undefined(store: Store) -> None:
    fill(store, texts(10, people=2))
    for item in range(1, 11):
        label(store, "ann", item)
        label(store, "bob", item)
    assert told(store, queue.agreement) == Agreement(10, 1.0, None)


# Undo


def test_undo_takes_back_the_last_label_and_shows_its_text(store: Store) -> None:
    fill(store, texts(3))
    first = taken(store, "ann")
    label(store, "ann", first.id)
    second = taken(store, "ann")
    assert undo(store, "ann") == first
    assert taken(store, "ann") == first  # and the other one is free again
    assert state(store, first.id) == ("open", None, 1)
    assert taken(store, "bob") == second
    with store.read() as db:
        assert events(db)[0]["what"] == "undo"


def test_undo_takes_back_a_whole_batch_and_then_the_one_before(store: Store) -> None:
    fill(store, texts(5))
    label(store, "ann", 5)
    label(store, "bob", 4)
    assert label(store, "ann", 1, 2, 3, 4) == [1, 2, 3]
    found = undo(store, "ann")
    assert found is not None
    assert found.id == 1
    assert read(store, "SELECT item, person FROM labels ORDER BY item") == [(4, "bob"), (5, "ann")]
    assert undo(store, "ann") is not None
    with pytest.raises(Problem, match="nothing to undo"):
        undo(store, "ann")
    assert state(store, 4) == ("agreed", CABLE, 1)


def test_undo_of_a_dispute_asks_for_one_person_less(store: Store) -> None:
    fill(store, texts(1, people=2))
    label(store, "ann", 1)
    label(store, "bob", 1, category=CASE)
    undo(store, "bob")
    assert state(store, 1) == ("open", None, 2)
    label(store, "bob", 1)
    assert state(store, 1) == ("agreed", CABLE, 2)


def test_undo_of_a_skip(store: Store) -> None:
    fill(store, texts(2))
    first = taken(store, "ann")
    label(store, "ann", first.id, kind="skip")
    assert undo(store, "ann") == first
    label(store, "ann", first.id, kind="skip")
    taken(store, "bob")
    label(store, "bob", first.id)
    found = undo(store, "ann")  # someone else has labelled it by now
    assert found is not None
    assert found != first
    assert state(store, first.id) == ("agreed", CABLE, 1)


def test_labels_that_a_model_was_trained_with_stay(store: Store) -> None:
    fill(store, texts(2))
    label(store, "ann", 1, 2)
    with store.write() as db:
        db.execute("UPDATE items SET retrained = 7 WHERE id = 2")
    with pytest.raises(Problem, match="trained"):
        undo(store, "ann")
    assert state(store, 1) == state(store, 2) == ("agreed", CABLE, 1)
    assert len(read(store, "SELECT * FROM labels")) == 2


# Many people at once


def test_eight_people_label_at_once_and_nothing_is_lost(store: Store) -> None:
    fill(store, texts(200))

    def work(person: str) -> list[int]:
        done = []
        while item := take(store, person):
            assert label(store, person, item.id) == [item.id]  # nobody else was given it
            done.append(item.id)
        return done

    with ThreadPoolExecutor(8) as pool:
        given = [item for done in pool.map(work, map(str, range(8))) for item in done]
    assert sorted(given) == list(range(1, 201))
    assert Counter(read(store, "SELECT state, agreed FROM items")) == {("agreed", CABLE): 200}
    assert read(store, "SELECT count(*), count(DISTINCT item) FROM labels") == [(200, 200)]
    assert read(store, "SELECT * FROM leases") == []


def test_second_opinions_of_many_people_at_once(store: Store) -> None:
    fill(store, texts(40, people=2))

    def work(person: str) -> None:
        while item := take(store, person):
            assert label(store, person, item.id) == [item.id]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, map(str, range(8))))
    # A thread may end while others still have the last texts. Whoever is left over labels what waits.
    work("one more")
    work("yet one more")
    assert read(store, "SELECT count(*), count(DISTINCT item) FROM labels") == [(80, 40)]
    assert {row[0] for row in read(store, "SELECT state FROM items")} == {"agreed"}


# Similar texts

CHINESE = [
    "华为手机快充数据线 1米 白色",
    "华为手机快充数据线 2米 黑色",
    "华为手机快充数据线2米红色",
    "红富士苹果 5斤装 新鲜水果",
    "猫粮 全价成猫粮 10kg",
]
ENGLISH = [
    "USB-C charging cable for phones, 1 m, white",
    "usb-c charging cable for phones, 2 m, black",
    "Fresh Fuji apples, 5 kg box",
]


def similar(store: Store, item: int, person: str = "ann", finder: Similar | None = None) -> list[str]:
    with store.read() as db:
        return [each.text for each in (finder or Similar()).find(db, person, item, NOW)]


def test_similar_texts_in_chinese_and_english(store: Store) -> None:
    fill(store, CHINESE + ENGLISH)
    assert set(similar(store, 1)) == set(CHINESE[1:3])
    assert similar(store, 6) == [ENGLISH[1]]
    assert similar(store, 4) == similar(store, 8) == []
    assert similar(store, 999) == []


def test_similar_texts_are_free_for_this_person(store: Store) -> None:
    fill(store, [f"华为手机快充数据线 {number}米" for number in range(1, 31)])
    with store.write() as db:
        db.execute("UPDATE items SET wanted = 1")
    finder = Similar()
    assert len(similar(store, 1, finder=finder)) == 10
    held = taken(store, "bob").text  # the least certain one
    assert held not in similar(store, 2, finder=finder)
    label(store, "ann", 2, kind="skip")
    label(store, "bob", *range(3, 29))
    left = similar(store, 29, finder=finder)
    assert len(left) == 1  # all others are labelled, skipped, or on the other person's screen
    assert left == ["华为手机快充数据线 30米"]


def test_similar_texts_that_come_later_are_found(store: Store) -> None:
    fill(store, CHINESE[:1])
    finder = Similar()
    assert similar(store, 1, finder=finder) == []
    fill(store, CHINESE[1:])
    assert set(similar(store, 1, finder=finder)) == set(CHINESE[1:3])
    label(store, "bob", 2, 4, 5)
    assert similar(store, 1, finder=finder) == [CHINESE[2]]
    fill(store, ENGLISH)
    assert similar(store, 6, finder=finder) == [ENGLISH[1]]


# The search of categories


def test_search_among_ten_thousand_categories() -> None:
    many = [f"部门{top} > 组{group} > 类{leaf}" for top in range(10) for group in range(25) for leaf in range(40)]
    special = [CABLE, CASE, "家居 > 数码收纳 > 数据线盒", "Toys > Cable cars", "Phones > Long cable > USB"]
    catalogue = Catalogue([*many, *special])
    assert catalogue.search("数据线", []) == [special[2], CABLE]  # alphabetical
    assert catalogue.search("数据线", [CABLE]) == [CABLE, special[2]]  # used before
    assert catalogue.search("线 手机", []) == [CABLE]  # any level, any order
    assert catalogue.search("手机配件 > 数据", []) == [CABLE]
    assert catalogue.search("CABLE", []) == [special[3], special[4]]  # at the beginning of a level first
    assert catalogue.search("ＣＡＢＬＥ usb", []) == [special[4]]
    assert catalogue.search("no such words", []) == []
    assert catalogue.search("", [CASE, "unknown"])[0] == CASE
    assert len(catalogue.search("部门1", [])) == 20
    assert CABLE in catalogue
    assert "数码" not in catalogue


def test_most_used_categories(store: Store) -> None:
    fill(store, texts(5))
    label(store, "ann", 1, 2, category=CASE)
    label(store, "bob", 3)
    label(store, "bob", 4, kind="none")
    assert told(store, lambda db: queue.most_used(db, 9)) == [CASE, CABLE]
    assert told(store, lambda db: queue.most_used(db, 1)) == [CASE]
    assert told(store, queue.named) == sorted([CABLE, CASE])
    with store.read() as db:
        assert queue.people(db) == [
            {"person": "ann", "labels": 2, "skips": 0},
            {"person": "bob", "labels": 2, "skips": 0},
        ]


# The routes, without a server


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(DeskOptions(url="localhost:1", folder=tmp_path, repository=tmp_path / "none"))


@pytest.fixture
def browser(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    # The server is found to be down once, and is then left alone for the whole test.
    monkeypatch.setattr(review, "RETRY_SECONDS", 3600.0)
    with TestClient(create_app(desk), base_url="http://localhost") as client:
        client.headers |= {"X-CSRF-Token": csrf(client.get("/review").text), "HX-Request": "true"}
        yield client


def csrf(page: str) -> str:
    found = re.search('data-csrf="([^"]+)"', page)
    assert found is not None
    return found[1]


def test_an_empty_queue_says_so(browser: TestClient) -> None:
    page = browser.get("/review")
    assert page.status_code == 200
    assert "All texts are labelled." in page.text
    assert 'href="/files"' in page.text


def test_label_from_the_page(browser: TestClient, desk: Desk) -> None:
    names = texts(3)
    fill(desk.store, names)
    page = browser.get("/review").text
    assert names[0] in page
    assert "The server does not answer now." in page
    assert f'value="{html.escape(CABLE)}" data-key="1"' in page
    assert f'value="{html.escape(CASE)}" data-key="2"' in page
    answer = browser.post("/review/label", data={"item": "1", "category": CASE})
    assert answer.status_code == 200
    assert names[1] in answer.text
    assert "1 labelled:" in answer.text
    assert state(desk.store, 1) == ("agreed", CASE, 1)
    again = browser.post("/review/label", data={"item": "1", "category": CABLE})  # a second key press
    assert "1 not labelled" in again.text
    assert names[1] in again.text
    assert state(desk.store, 1) == ("agreed", CASE, 1)
    assert names[2] in browser.post("/review/label", data={"item": "2", "kind": "skip", "also": "3"}).text
    assert read(desk.store, "SELECT item, kind FROM labels ORDER BY item") == [(1, "category"), (2, "skip")]
    back = browser.post("/review/undo").text
    assert names[1] in back
    assert "taken back" in back
    done = browser.post("/review/label", data={"item": "2", "kind": "none", "also": "3"}).text
    assert "2 labelled: none of these." in done
    assert "All texts are labelled." in done


def test_two_people_who_log_in_get_different_texts(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review, "RETRY_SECONDS", 3600.0)
    fill(desk.store, texts(3))
    app = create_app(desk)
    shown = []
    for name in ("ann", "bob"):
        desk.users.set_password(name, "a long password")
        browser = TestClient(app, base_url="http://localhost")
        token = {"X-CSRF-Token": csrf(browser.get("/login").text)}
        assert browser.post("/login", data={"name": name, "password": "a long password"}, headers=token).is_success
        page = browser.get("/review").text
        shown.append([each for each in texts(3) if each in page])
    assert shown == [texts(3)[:1], texts(3)[1:2]]
    assert read(desk.store, "SELECT item, person FROM leases ORDER BY item") == [(1, "ann"), (2, "bob")]


def test_skipped_texts_can_come_back(browser: TestClient, desk: Desk) -> None:
    fill(desk.store, texts(1))
    page = browser.post("/review/label", data={"item": "1", "kind": "skip"}).text
    assert "Nothing is left for you at the moment." in page
    assert texts(1)[0] in browser.post("/review/skipped").text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"item": "1", "category": "no such category"}, "no such category is no category of the model."),
        ({"item": "1"}, "Choose a category."),
        ({"item": "1", "kind": "other", "category": CABLE}, "Choose a category."),
        ({"item": "x", "category": CABLE}, "The page is too old. Load it again."),
        ({"category": CABLE}, "The page is too old. Load it again."),
        ({"item": "1", "category": CABLE, "also": "x"}, "The page is too old. Load it again."),
        ({"item": str(2**70), "category": CABLE}, "The page is too old. Load it again."),
        ({"item": "1", "category": CABLE, "also": list(map(str, range(2, 30)))}, "The page is too old. Load it again."),
    ],
)
def test_what_cannot_be_labelled_is_said_and_nothing_is_lost(
    browser: TestClient, desk: Desk, fields: dict[str, str | list[str]], said: str
) -> None:
    fill(desk.store, texts(2))
    answer = browser.post("/review/label", data=fields)
    assert answer.status_code == 422
    assert said in answer.text
    assert texts(2)[0] in answer.text  # still on the screen
    assert read(desk.store, "SELECT * FROM labels") == []


def test_undo_of_nothing_is_said(browser: TestClient) -> None:
    answer = browser.post("/review/undo")
    assert answer.status_code == 409
    assert "There is nothing to undo." in answer.text


def test_the_page_shows_texts_and_not_their_markup(browser: TestClient, desk: Desk) -> None:
    text = "<script>alert('x')</script> \"><img src=x onerror=alert(1)>"
    fill(desk.store, [text, f"{text} again"])
    page = browser.get("/review").text + browser.get("/review/similar?item=1").text
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert" in page


def test_search_and_similar_texts_without_a_server(browser: TestClient, desk: Desk) -> None:
    fill(desk.store, CHINESE)
    found = browser.get("/review/categories", params={"q": "数据线"}).text
    assert re.findall('data-category="([^"]+)"', found) == [html.escape(CABLE)]
    assert "No category has these words." in browser.get("/review/categories", params={"q": "zzz"}).text
    page = browser.get("/review/similar?item=1").text
    assert page.count('name="also"') == 2
    assert 'form="label"' in page
    assert browser.get("/review/similar?item=77").status_code == 200


def test_the_summary_shows_agreement_and_people(browser: TestClient, desk: Desk) -> None:
    assert "No text was labelled by two people yet." in browser.get("/review/summary").text
    set_team(desk.store, "ann", "bob")
    fill(desk.store, texts(10, people=2))
    for item in range(1, 11):
        label(desk.store, "ann", item, category=CABLE if item % 2 else CASE)
        label(desk.store, "bob", item, category=CABLE if item % 2 else CASE)
    page = browser.get("/review/summary").text
    assert "10 texts were labelled by two people." in page
    assert "They agree on 100% of these." in page
    assert "1.00" in page
    assert "ann" in page


def test_who_is_removed_decides_no_dispute(browser: TestClient, desk: Desk) -> None:
    """The desk sees it at once, without a restart. The page says what becomes of the text."""
    set_team(desk.store, "local", "bob", "cy")
    fill(desk.store, texts(1, people=2))
    label(desk.store, "local", 1)
    label(desk.store, "bob", 1, category=CASE)
    page = browser.get("/review").text  # by now there are no people
    assert "All texts are labelled." in page
    assert "People disagree on 1 texts, and nobody is left to decide." in page
    assert "1 disputed" in page


def test_the_page_speaks_chinese(browser: TestClient, desk: Desk) -> None:
    fill(desk.store, texts(1))
    assert '<html lang="zh">' in browser.get("/review", headers={"Accept-Language": "zh-CN"}).text
