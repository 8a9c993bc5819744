import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aisle.errors import InputError
from aisle.preprocess.encode import TextTokenizer
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.evaluation.attribution import GRADIENTS, OCCLUSION, integrated_gradients, marks, read
from aisle.train.evaluation.explain import explain
from aisle.train.evaluation.faithfulness import RANDOM, REMOVED, SHARES, check, how_many
from aisle.train.evaluation.predictors import CheckpointPredictor
from aisle.train.fit.model import train_tokenizer

from .conftest import Server, aisle, rename_labels

TITLES = ["红富士苹果 5斤装 新鲜水果", "蓝牙耳机 主动降噪 wireless", "usb c cable 2m"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["苹果 手机 wire less", "苹果 手机壳"] * 50, 12).save(str(path))
    return TextTokenizer(path)


def _words(text: str, tokenizer: TextTokenizer | None) -> list[str]:
    reading = read(text, tokenizer)
    return [reading.text[start:end] for start, end in reading.words]


def test_a_word_is_a_run_of_letters_a_sign_or_a_piece_of_chinese(tokenizer: TextTokenizer) -> None:
    assert _words("苹果手机, Wireless!", tokenizer) == ["苹果", "手机", ",", "Wireless", "!"]
    assert _words("苹果手机, Wireless!", None) == ["苹", "果", "手", "机", ",", "Wireless", "!"]
    assert _words("Lésswíre 苹果", tokenizer)[-1] == "苹果"  # accents are dropped, but positions still match


def test_words_behind_the_token_limit_stay_cut(tokenizer: TextTokenizer) -> None:
    reading = read("苹果 " * 30 + "手机", tokenizer)
    assert len(reading.tokens) == tokenizer.max_tokens
    assert len(reading.words) == tokenizer.max_tokens - 2
    assert reading.text == ("苹果 " * 10).strip()
    assert reading.unread == 30 * 3 + 2 - len(reading.text)
    assert tokenizer.tokens([reading.text])[0] == reading.tokens
    assert "手机" not in reading.without([0, 4])


@given(st.text(st.sampled_from("苹果手机壳wireless é5.,!😀"), min_size=1))
def test_words_are_ordered_positions_in_the_text(tokenizer: TextTokenizer, text: str) -> None:
    for reading in (read(text, tokenizer), read(text, None)):
        ends = [place for word in reading.words for place in word]
        assert ends == sorted(ends)
        assert all(start < end for start, end in reading.words)
        assert all(len(reading.text[start:end].split()) == 1 for start, end in reading.words)
        assert reading.without(range(len(reading.words))).strip() == ""
        assert reading.without([]) == reading.text


def test_integrated_gradients_are_complete(checkpoint: Path) -> None:
    """The words' weights add up to the difference between the text and the baseline, in any batch."""
    model = CheckpointPredictor(Checkpoint(checkpoint))
    readings = [read(text, model.tokenizer) for text in TITLES]
    categories = [answer.category for answer in model.predict(TITLES)]
    together = integrated_gradients(model, readings, categories)
    for each in together:
        assert each.value > each.baseline + 1
        assert abs(each.gap) < 0.05 * (each.value - each.baseline)
    alone = integrated_gradients(model, readings[:1], categories[:1])[0]
    assert alone.weights == pytest.approx(together[0].weights, abs=1e-3)


def test_checkpoint_and_server_explain_one_category(checkpoint: Path, server: Server, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    texts = [*TITLES, "<b onclick='x'> a<c & 苹果", "苹果"]
    result = explain(texts, checkpoint=checkpoint, url=server.url, report=page)
    assert json.loads(page.with_suffix(".json").read_text("utf-8"))["methods"] == result["methods"]
    assert result["methods"] == [GRADIENTS, OCCLUSION]
    for each in result["explanations"]:
        probability = math.exp(each["completeness"]["log_probability"])
        assert each["confidence"] == pytest.approx(probability, abs=2e-3)  # the engine is fp32
        for method in result["methods"]:
            assert "".join(piece for piece, _ in marks(each, method)) == each["text"]
            assert max(abs(share) for _, share in marks(each, method)) == 1
    one = result["explanations"][-1]
    assert len(one["words"]) == 1  # without it, no word is left
    assert one["words"][0][OCCLUSION] == pytest.approx(one["confidence"])
    html = page.read_text("utf-8")
    assert "a</span>" in html
    assert "&lt;" in html
    assert not re.search(r"<(script|link|img|b|c)\b", html)


def test_a_server_alone_is_enough(server: Server) -> None:
    (each,) = explain(["红富士苹果 5斤装"], url=server.url)["explanations"]
    assert [word["word"] for word in each["words"]] == [*"红富士苹果", "5", "斤", "装"]
    assert "completeness" not in each
    assert all(-1 <= word[OCCLUSION] <= 1 for word in each["words"])


def test_deleting_the_top_words_lowers_the_probability(
    checkpoint: Path, server: Server, sample: Path, tmp_path: Path
) -> None:
    """Without them, the probability falls far more than without as many random words (the deletion check)."""
    page = tmp_path / "check.html"
    result = check(sample, "text", checkpoint=checkpoint, url=server.url, rows=60, report=page)
    assert json.loads(page.with_suffix(".json").read_text("utf-8"))["texts"] == result["texts"]
    methods = {each["method"]: each for each in result["methods"]}
    assert list(methods) == [GRADIENTS, OCCLUSION, RANDOM]
    assert result["texts"] == 60
    for method in (GRADIENTS, OCCLUSION):
        assert methods[method]["fall"] > 2 * methods[RANDOM]["fall"], method
        assert methods[method]["fall"] - methods[RANDOM]["fall"] > 3 * methods[method]["error"], method
        assert methods[method]["changed"] > methods[RANDOM]["changed"]
        assert methods[method]["area"] < methods[RANDOM]["area"]
    for each in methods.values():
        assert each["curve"][0] == pytest.approx(result["confidence"], abs=1e-3)
        assert each["curve"][0] - each["curve"][SHARES.index(REMOVED)] == pytest.approx(each["fall"], abs=1e-6)
    html = page.read_text("utf-8")
    assert html.count("<svg") == 1
    assert "random words" in html


def test_deletion_never_removes_all_words() -> None:
    assert [how_many(share, 5) for share in (0, 0.1, 0.2, 0.9)] == [0, 1, 1, 4]
    assert how_many(REMOVED, 20) == 4


def test_the_command_shows_words_and_writes_json(checkpoint: Path) -> None:
    done = aisle("explain", "[red]红富士苹果", "--checkpoint", checkpoint)
    assert done.returncode == 0, done.stderr
    assert "[red]" in done.stdout.replace(" ", "")
    assert "The words account for " in done.stdout
    assert "nats" not in done.stdout
    done = aisle("explain", *TITLES, "--checkpoint", checkpoint, "--json")
    assert [each["text"] for each in json.loads(done.stdout)["explanations"]] == TITLES


def test_bad_input_is_one_line(checkpoint: Path, server: Server, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in checkpoint.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    labels = json.loads((other / "labels.json").read_text("utf-8"))
    rename_labels(other, ["else", *labels[1:]])
    with pytest.raises(InputError, match="categories are not the checkpoint's"):
        explain(["好"], checkpoint=other, url=server.url)
    (tmp_path / "short.csv").write_text("text\n好\n", "utf-8")
    with pytest.raises(InputError, match="has 5 words or more"):
        check(tmp_path / "short.csv", "text", checkpoint=checkpoint, rows=3)
    for texts, options, complaint in [
        ([], {"url": server.url}, "give a text"),
        (["好"], {}, "give --checkpoint DIR"),
        ([" "], {"url": server.url}, "empty once cleaned"),
        (["好"], {"checkpoint": tmp_path}, "is not a checkpoint"),
    ]:
        with pytest.raises(InputError, match=complaint):
            explain(texts, **options)  # type: ignore[arg-type]
    done = aisle("explain", "好", "--check", tmp_path / "short.csv", "--checkpoint", checkpoint)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("aisle: --check reads its texts from the table")
    done = aisle("explain", "好", "--url", "localhost:1")
    assert done.returncode == 1
    assert done.stderr.startswith("aisle: ")
    assert "Traceback" not in done.stderr
