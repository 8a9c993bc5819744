"""The Chinese characters, as one character range that all regular expressions share."""

# CJK unified ideographs, extension A, compatibility ideographs, extensions B to H. Use it inside [ ] of a pattern.
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
