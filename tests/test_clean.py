import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aisle.preprocess.clean import MAX_BYTES, clean, clean_rows, content_key, prepare
from aisle.preprocess.values import TextError

from .conftest import assert_linear


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("ＡＢＣ１２３　全角", "ABC123 全角"),
        ("苹果&amp;香蕉&nbsp;5&lt;6", "苹果&香蕉 5<6"),
        ("<b>手机壳</b><br/>防摔", "手机壳 防摔"),
        ("<!-- note -->耳机<script>alert(1)</script>", "耳机"),
        ("&amp;lt;b&amp;gt;键盘", "键盘"),
        ("包邮!!!  好评。。。", "包邮! 好评。"),
        ("C++ primer  1.5L", "C++ primer 1.5L"),
        ("tab\tnew\nline\x00nul\u200bzero", "tab new line nulzero"),
        ("\ufeffＵＳＢ－Ｃ", "USB-C"),
        ("a < b and c > d", "a < b and c > d"),
        ("①②㎏", "12kg"),
    ],
)
def test_clean(raw: str, cleaned: str) -> None:
    assert clean(raw) == cleaned


@given(st.text())
def test_cleaned_text_is_normal(raw: str) -> None:
    cleaned = clean(raw)
    assert not any(unicodedata.category(c) == "Cc" for c in cleaned)
    assert cleaned == cleaned.strip()
    assert "  " not in cleaned


@given(st.text(st.characters(exclude_characters="&<>", exclude_categories=["Cs"])))
def test_cleaning_twice_changes_nothing(raw: str) -> None:
    assert clean(clean(raw)) == clean(raw)


@given(st.binary() | st.text() | st.none())
def test_prepare_cleans_or_says_why(raw: bytes | str | None) -> None:
    try:
        prepared = prepare(raw)
    except TextError:
        return
    assert prepared == prepared.strip() != ""


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (None, "text missing"),
        ("", "empty"),
        (" \u200b<br>", "empty"),
        (b"\xff\xfe", "not UTF-8"),
        ("\ud800", "not UTF-8"),
        ("长" * (MAX_BYTES // 3 + 1), "over-long"),
    ],
)
def test_prepare_refuses(raw: str | bytes | None, reason: str) -> None:
    with pytest.raises(TextError) as caught:
        prepare(raw)
    assert caught.value.reason == reason


@pytest.mark.parametrize("unit", ["<!--", "<script>", "&amp;", "<a ", "&lt;", "!?", "<"])
def test_no_text_is_costly_to_clean(unit: str) -> None:
    """Cost grows with length, not its square."""
    assert_linear(clean, unit)


def test_clean_rows_drops_rows_and_counts_them() -> None:
    rows = [
        ("红富士苹果", "水果"),
        ("红富士 苹果!", "水果"),  # the same except for spaces and punctuation
        ("<b></b>", "水果"),
        (None, "水果"),
        ("香蕉", None),
        ("苹果手机壳", "手机壳"),
        ("苹果手机壳", "水果"),
        ("苹果手机壳", "手机壳"),
        ("x" * (MAX_BYTES + 1), "水果"),
        ("牛奶1.5L", "奶"),
        ("牛奶15L", "奶"),
    ]
    table, report = clean_rows(rows)
    assert table.texts == ["红富士苹果", "牛奶1.5L", "牛奶15L"]
    assert table.labels == ["水果", "奶", "奶"]
    assert report.dropped == {
        "duplicate": 1,
        "empty": 1,
        "text missing": 1,
        "label missing": 1,
        "conflicting labels": 3,
        "over-long": 1,
    }
    assert report.examples["conflicting labels"] == [6, 7, 8]
    assert report.rows_in == len(rows) == report.rows_kept + sum(report.dropped.values())


def test_content_key_ignores_case_spaces_and_punctuation() -> None:
    assert content_key("USB-C 线, 2m") == content_key("usb c线2m！")
    assert content_key("1.5L") != content_key("15L")
    assert content_key("!!!") != content_key("???")
    assert re.fullmatch(rb".{16}", content_key("x"), re.S)
