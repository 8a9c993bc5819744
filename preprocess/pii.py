"""Scrubbing: replace phone and ID-card numbers, e-mail and street addresses and chat accounts by a word.

A word takes the place, for two reasons: a text that is only a number can still be classified, and the parts before and
after it do not run together. The words are common in Chinese, one or two tokens in any tokenizer that knows Chinese,
so the text still reads naturally: "电话:电话", "加QQ 账号". Service numbers such as 400-820-8820 belong to no person
and stay. Names of people stay too, because they cannot be distinguished from brands.
"""

from __future__ import annotations

import re
from collections import Counter

from aisle.preprocess.han import HAN

WORDS = {"email": "邮箱", "id_card": "证件", "phone": "电话", "account": "账号", "address": "地址"}

_NO_CODE_BEFORE = r"(?<![0-9A-Za-z_])(?<![0-9]\.)"  # digits inside a longer code or a decimal do not count
_NO_CODE_AFTER = r"(?![0-9A-Za-z_]|\.[0-9])"

# One match takes a whole run of address characters, so that the rest cannot look like another address.
_EMAIL = r"(?<![\w.%+@-])@*[\w.%+-]{1,64}@[\w.%+@-]*\.[A-Za-z]{2}[\w.%+@-]*"
_ID_CARD = (
    _NO_CODE_BEFORE + r"[1-9]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx]" + _NO_CODE_AFTER
)
_MOBILE = (
    _NO_CODE_BEFORE
    + r"(?:(?:\+|00)?86[ -]?)?1(?:3\d|4[014-9]|5[0-35-9]|6[2567]|7[0-8]|8\d|9[0-35-9])(?P<gap>[ -]?)\d{4}(?P=gap)\d{4}"
    + _NO_CODE_AFTER
)
_AREA = r"(?:10|2\d|[3-9]\d\d)"
_LANDLINE = (
    _NO_CODE_BEFORE
    + rf"(?:\(0{_AREA}\) ?|(?:\+86[ -]?0?|0){_AREA}[ -])[2-8]\d{{2,3}}[ -]?\d{{4}}(?:(?:-|转) ?\d{{1,6}})?"
    + _NO_CODE_AFTER
)
# A number or name is an account only after a word such as QQ; a name without digits only after a colon.
_QQ = r"(?P<qq>(?:(?<![A-Za-z])qq|扣扣)(?:群号?|号码?)?[是为]?[ :]{0,3})[1-9]\d{5,10}" + _NO_CODE_AFTER
_WECHAT = (
    r"(?P<wechat>(?:[微薇威]信|(?<![A-Za-z])(?:we ?chat|weixin))(?:号码?| ?id)?[是为]?[ :]{0,3}"
    r"|(?<![A-Za-z])[vw]x(?:号|id)?[是为: ]{0,2}(?<=[号:]))"
    r"(?:[1-9]\d{5,10}|(?=[A-Za-z_-]{1,19}\d)[a-z][\w-]{5,19}|(?:(?<=[:号])|(?<=: ))[a-z][\w-]{5,19})(?![\w-])"
)
# A street address: a place, then a street with a house number; or a street, a house number and a flat.
# A street with a number alone stays, because "3号" is also a day of the month.
_PLACE = rf"[{HAN}]{{2}}(?:省|(?<![超城])市(?!场)|(?<![小地])区(?!别)|县|镇|乡)"
_STREET = r"(?:路|街|巷|弄|胡同|大道|村|小区|花园|公寓|大厦|广场|苑)"
_HOUSE = r" ?\d{1,5}(?:-\d{1,5})?(?:号楼?|弄|栋|幢)"
_FLAT = (
    r"(?:[ ,-]?\d{1,5}号"
    rf"|[{HAN}]{{0,12}}?[ ,-]?[A-Za-z]?\d{{1,5}}(?:-\d{{1,5}}){{0,3}}(?:号楼|栋|幢|座|单元|楼|层|室|房))"
)
_ADDRESS = rf"{_PLACE}[{HAN}]{{2,30}}?{_STREET}{_HOUSE}{_FLAT}{{0,5}}|[{HAN}]{{2}}{_STREET}{_HOUSE}{_FLAT}{{1,5}}"

_PII = re.compile(
    rf"(?P<email>{_EMAIL})|(?P<id_card>{_ID_CARD})|(?P<phone>{_MOBILE}|{_LANDLINE})"
    rf"|(?P<account>{_QQ}|{_WECHAT})|(?P<address>{_ADDRESS})",
    re.ASCII | re.IGNORECASE,
)
# Quick checks: a text with personal data has an @ or matches _NUMBER or _CHAT; most texts do not. One common pattern
# would be three times slower, because `re` skips ahead only if all alternatives begin with one class of characters.
_CANDIDATE = re.compile(r"[0-9@QqWwVv微薇威扣]")
_NUMBER = re.compile(r"[0-9](?:[0-9]{2}[ -]?[0-9]{4}|[0-9-]{0,10}[号弄栋幢])")
_CHAT = re.compile(r"[QqWwVv微薇威扣](?:[Qq]|信|扣|[Ee] ?[CcIi]|[Xx])")


def scrub(text: str, found: Counter[str] | None = None) -> str:
    """Return a cleaned text with its personal data replaced. Scrubbing a scrubbed text changes nothing.

    Args:
        text: half-width, as `clean` returns it.
        found: if given, counts the replacements by kind; its keys are those of `WORDS`.
    """
    if not _CANDIDATE.search(text) or not ("@" in text or _NUMBER.search(text) or _CHAT.search(text)):
        return text

    def replace(match: re.Match[str]) -> str:
        kind = next(kind for kind in WORDS if match[kind])
        if kind == "id_card" and not _is_id_card(match[0]):
            return match[0]
        if found is not None:
            found[kind] += 1
        return (match["qq"] or match["wechat"] or "") + WORDS[kind]

    while (scrubbed := _PII.sub(replace, text)) != text:  # a replacement can make a neighbour match
        text = scrubbed
    return text


def _is_id_card(number: str) -> bool:
    """Verify the last character of an 18-digit ID-card number (GB 11643-1999, ISO 7064 MOD 11-2)."""
    total = sum(2 ** (17 - place) * int(digit) for place, digit in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()
