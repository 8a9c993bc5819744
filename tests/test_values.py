"""Which values are text, and which are not."""

from __future__ import annotations

import datetime
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from aisle.preprocess.values import TextError, as_text


class NAType:
    """Like pandas' NA: it is neither equal nor unequal to itself."""

    def __ne__(self, _: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("苹果", "苹果"),
        ("nan", "nan"),
        ("", ""),
        (b"\xff", b"\xff"),
        (bytearray(b"usb"), b"usb"),
        (memoryview(b"usb"), b"usb"),
        (np.str_("usb"), "usb"),
        (None, None),
        (math.nan, None),
        (np.float32("nan"), None),
        (Decimal("NaN"), None),
        (Decimal("sNaN"), None),
        (NAType(), None),
        (12, "12"),
        (12.0, "12"),
        (-0.5, "-0.5"),
        (1e300, "1e+300"),
        (10**20, "100000000000000000000"),
        (np.int64(7), "7"),
        (np.float32(0.1), "0.1"),
        (Decimal("1.50"), "1.50"),
        (datetime.date(2026, 11, 26), "2026-11-26"),
        (datetime.datetime(2026, 11, 26, 8), "2026-11-26 08:00:00"),
    ],
)
def test_a_value_has_one_text(value: object, text: object) -> None:
    assert as_text(value) == text


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (True, "true or false"),
        (np.bool_(True), "bool"),
        (["苹果"], "a list"),
        ({"title": "苹果"}, "an object"),
        (math.inf, "inf"),
        (1j, "complex"),
        (object(), "object"),
        (np.array([1, 2]), "ndarray"),
    ],
)
def test_values_that_are_not_text_are_refused(value: object, named: str) -> None:
    with pytest.raises(TextError, match=rf"text is .*{named}.*; send a string") as refused:
        as_text(value)
    assert refused.value.reason == "not text"


def test_infinite_numbers_are_refused() -> None:
    with pytest.raises(TextError, match="too long to write out"):
        as_text(10**5000)
