"""The languages of the pages: English, and translations keyed by the English text."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

NAMES = {"en": "English", "zh": "中文"}


@cache
def translations(language: str) -> dict[str, str]:
    """Return the translations of a language; none for English."""
    path = Path(__file__).with_name(f"{language}.json")
    found: dict[str, str] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def translate(language: str, text: str, **values: object) -> str:
    """Return a text in a language, with `{name}` replaced by values."""
    wanted = translations(language).get(text, text)
    return wanted.format(**values) if values else wanted


def preferred(accepted: str) -> str:
    """Return the language for an Accept-Language header: the first that the desk has, by its quality value."""
    wishes = []
    for order, each in enumerate(accepted.split(",")):
        tag, _, quality = each.partition(";q=")
        try:
            weight = float(quality or 1)
        except ValueError:
            continue
        wishes.append((-weight, order, tag.strip().lower().partition("-")[0]))
    return next((tag for _, _, tag in sorted(wishes) if tag in NAMES), "en")
