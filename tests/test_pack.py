import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aisle.preprocess.pack import pack


@given(st.lists(st.integers(1, 128), min_size=1, max_size=80))
def test_every_text_is_in_one_row(sizes: list[int]) -> None:
    lengths = np.array(sizes)
    tokens = np.arange(1, lengths.sum() + 1)
    packed = pack(tokens, lengths, 128)
    _, width = packed.input_ids.shape
    assert width <= 128
    flat = [array.reshape(-1) for array in packed[:3]]
    for number, (start, text) in enumerate(
        zip(packed.cls_index, np.split(tokens, np.cumsum(lengths)[:-1]), strict=True), start=1
    ):
        span = slice(start, start + len(text))
        assert start // width == (start + len(text) - 1) // width
        assert (flat[0][span] == text).all()
        assert (flat[1][span] == np.arange(len(text))).all()
        assert (flat[2][span] == number).all()
    assert (flat[2] > 0).sum() == len(tokens)  # and nothing else


def test_rows_are_full() -> None:
    """Real texts have many short and some maximal lengths. Then nearly all computed tokens are useful."""
    lengths = np.minimum(128, np.random.default_rng(0).lognormal(3.6, 0.8, 64).astype(int) + 2)
    packed = pack(np.zeros(lengths.sum(), int), lengths, 128)
    assert lengths.sum() / packed.input_ids.size > 0.95


def test_a_single_text_has_a_row_of_its_length() -> None:
    assert pack(np.zeros(21, int), np.array([21]), 128).input_ids.shape == (1, 24)


def test_rows_of_a_few_texts_are_narrow() -> None:
    lengths = np.array([70, 66, 65, 20])
    tokens = np.zeros(lengths.sum(), int)
    assert pack(tokens, lengths, 128).input_ids.shape == (3, 88)
    assert pack(tokens, lengths, 128, narrow=False).input_ids.shape == (3, 128)
