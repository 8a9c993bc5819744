"""Guess the encoding of a file that is not UTF-8, but only if exactly one candidate gives plausible text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

PLAUSIBLE = 0.9  # least share of common characters among those outside ASCII
CHARACTERS = 4  # least number of characters outside ASCII; fewer prove nothing
KANA = 0.1  # least share of kana in a Japanese text


def guess(lines: Sequence[bytes]) -> str | None:
    """Return Python's name of the encoding of lines that are not UTF-8, or None if it is not certain.

    Single-byte encodings are no candidates, because they decode any bytes.
    """
    data = b"\n".join(lines)
    plausible = [name for name, common in CANDIDATES.items() if _is_plausible(data, name, common)]
    return plausible[0] if len(plausible) == 1 else None


def _is_plausible(data: bytes, name: str, common: Callable[[str], bool]) -> bool:
    try:
        text = data.decode(name)
    except UnicodeDecodeError:
        return False
    beyond = [c for c in text if not c.isascii()]
    if len(beyond) < CHARACTERS:
        return False
    if name in ("shift_jis", "euc_jp") and sum("\u3041" <= c <= "\u30fa" for c in beyond) < KANA * len(beyond):
        return False
    return sum(map(common, beyond)) >= PLAUSIBLE * len(beyond)


def _lead(text: str, encoding: str) -> int:
    try:
        encoded = text.encode(encoding)
    except UnicodeEncodeError:
        return 0
    return encoded[0] if len(encoded) == 2 else 0


def _is_punctuation(c: str) -> bool:
    return c in "\u3000、。《》〈〉「」『』【】…·—“”‘’￥" or "\uff01" <= c <= "\uff5e"


def _is_simplified(c: str) -> bool:
    return 0xB0 <= _lead(c, "gb2312") <= 0xD7 or _is_punctuation(c)


def _is_traditional(c: str) -> bool:
    return 0xA4 <= _lead(c, "big5") <= 0xC6 or _is_punctuation(c)


def _is_japanese(c: str) -> bool:
    return "\u3041" <= c <= "\u30ff" or 0x88 <= _lead(c, "shift_jis") <= 0x97 or _is_punctuation(c)


def _is_hangul(c: str) -> bool:
    return "\uac00" <= c <= "\ud7a3" or _is_punctuation(c)


# The common characters of each encoding. For Chinese and Japanese, they are the first level of the standard.
CANDIDATES: dict[str, Callable[[str], bool]] = {
    "gb18030": _is_simplified,
    "big5": _is_traditional,
    "shift_jis": _is_japanese,
    "euc_jp": _is_japanese,
    "euc_kr": _is_hangul,
}
SHOWN = {"gb18030": "GBK", "big5": "Big5", "shift_jis": "Shift JIS", "euc_jp": "EUC-JP", "euc_kr": "EUC-KR"}
