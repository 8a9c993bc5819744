"""Scrubbing: phone and ID-card numbers, e-mail and street addresses and chat accounts give way to a word.

The word stands where the find stood, for two reasons: a text that was nothing but a number can still be classified, and
its neighbours do not run together into something new. Each is a common Chinese word, one or two tokens for any
tokenizer that knows Chinese, so what remains reads as a sentence does: "电话:电话", "加QQ 账号". A service number such
as 400-820-8820 is nobody's own and stays; so do names, which cannot be told from brands.
"""

from __future__ import annotations

import re
from collections import Counter

WORDS = {"email": "邮箱", "id_card": "证件", "phone": "电话", "account": "账号", "address": "地址"}

_HAN = "[\u4e00-\u9fff]"
_NO_CODE_BEFORE = r"(?<![0-9A-Za-z_])(?<![0-9]\.)"  # part of a longer code or of a decimal is no number of its own
_NO_CODE_AFTER = r"(?![0-9A-Za-z_]|\.[0-9])"

# One try for a run of address characters, and all of it goes: its rest cannot look like another address.
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
# A number or name counts as an account only behind the word that says so; a name without digits only behind a colon.
_QQ = r"(?P<qq>(?:(?<![A-Za-z])qq|扣扣)(?:群号?|号码?)?[是为]?[ :]{0,3})[1-9]\d{5,10}" + _NO_CODE_AFTER
_WECHAT = (
    r"(?P<wechat>(?:[微薇威]信|(?<![A-Za-z])(?:we ?chat|weixin))(?:号码?| ?id)?[是为]?[ :]{0,3}"
    r"|(?<![A-Za-z])[vw]x(?:号|id)?[是为: ]{0,2}(?<=[号:]))"
    r"(?:[1-9]\d{5,10}|(?=[A-Za-z_-]{1,19}\d)[a-z][\w-]{5,19}|(?:(?<=[:号])|(?<=: ))[a-z][\w-]{5,19})(?![\w-])"
)
# A street address: a place, then a street with a house number; or a street, a house number and a flat.
# A street with a number alone stays, for "3号" is also a day of the month.
_PLACE = rf"{_HAN}{{2}}(?:省|(?<![超城])市(?!场)|(?<![小地])区(?!别)|县|镇|乡)"
_STREET = r"(?:路|街|巷|弄|胡同|大道|村|小区|花园|公寓|大厦|广场|苑)"
_HOUSE = r" ?\d{1,5}(?:-\d{1,5})?(?:号楼?|弄|栋|幢)"
_FLAT = (
    r"(?:[ ,-]?\d{1,5}号"
    rf"|{_HAN}{{0,12}}?[ ,-]?[A-Za-z]?\d{{1,5}}(?:-\d{{1,5}}){{0,3}}(?:号楼|栋|幢|座|单元|楼|层|室|房))"
)
_ADDRESS = rf"{_PLACE}{_HAN}{{2,30}}?{_STREET}{_HOUSE}{_FLAT}{{0,5}}|{_HAN}{{2}}{_STREET}{_HOUSE}{_FLAT}{{1,5}}"

_PII = re.compile(
    rf"(?P<email>{_EMAIL})|(?P<id_card>{_ID_CARD})|(?P<phone>{_MOBILE}|{_LANDLINE})"
    rf"|(?P<account>{_QQ}|{_WECHAT})|(?P<address>{_ADDRESS})",
    re.ASCII | re.IGNORECASE,
)
# Whatever has a find has an @ or one of these; most texts have none. One pattern of all would search three times as
# long, for `re` skips ahead only where every alternative begins with one class of characters.
_NUMBER = re.compile(r"[0-9](?:[0-9]{2}[ -]?[0-9]{4}|[0-9-]{0,10}[号弄栋幢])")
_CHAT = re.compile(r"[QqWwVv微薇威扣](?:[Qq]|信|扣|[Ee] ?[CcIi]|[Xx])")


def scrub(text: str, found: Counter[str] | None = None) -> str:
    """Return a cleaned text with its personal data replaced; scrubbing twice changes nothing more.

    Args:
        text: half-width, as `clean` leaves it.
        found: counts the finds by kind, if given; its keys are those of `WORDS`.
    """
    if not ("@" in text or _NUMBER.search(text) or _CHAT.search(text)):
        return text

    def replace(match: re.Match[str]) -> str:
        kind = next(kind for kind in WORDS if match[kind])
        if kind == "id_card" and not _is_id_card(match[0]):
            return match[0]
        if found is not None:
            found[kind] += 1
        return (match["qq"] or match["wechat"] or "") + WORDS[kind]

    while (scrubbed := _PII.sub(replace, text)) != text:  # a find may have hidden its neighbour
        text = scrubbed
    return text


def _is_id_card(number: str) -> bool:
    """Verify the last character of an 18-digit ID-card number (GB 11643-1999, ISO 7064 MOD 11-2)."""
    total = sum(2 ** (17 - place) * int(digit) for place, digit in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()
