import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from aisle.cli import app
from aisle.errors import InputError
from aisle.files import write_json
from aisle.loadtest.frontier import judge
from aisle.preprocess.clean import Table
from aisle.preprocess.encode import MULTILINGUAL, SPECIAL, Encoder
from aisle.train.checkpoint import load_model, read_labels
from aisle.train.data import is_held_out, split
from aisle.train.distil import Apprentice, Distillation, Plan, Teachers, distil, spaced, student_of
from aisle.train.evaluate import evaluate, logits_of
from aisle.train.linear import LinearTeacher
from aisle.train.pretrain import unlabelled
from aisle.train.processes import processes
from aisle.train.prune import needed, prune_vocabulary, shrink
from aisle.train.settings import Settings
from aisle.train.train import train

from .test_pretrain import sentencepiece
from .test_train import FRUIT, table

TEXTS, LABELS = [text for text, _ in FRUIT], [label for _, label in FRUIT]
QUICK = Settings(epochs=8, batch_size=8, patience=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table(tmp_path_factory.mktemp("data") / "fruit.csv", FRUIT)


@pytest.fixture(scope="module")
def teacher(fruit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    told = Settings(epochs=8, batch_size=8, patience=4, layers=3, hidden_size=128)
    assert train(fruit, "text", "category", folder, told)["accuracy"] > 0.9
    return folder


def bert(layers: int, size: int) -> Any:
    torch.manual_seed(layers)
    config = BertConfig(
        vocab_size=50,
        hidden_size=size,
        num_hidden_layers=layers,
        num_attention_heads=size // 8,
        intermediate_size=4 * size,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command in this process, and return what it says in JSON."""

    def run(*arguments: Any) -> Any:
        capsys.readouterr()
        app([*map(str, arguments), "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    return run


def test_layers_are_evenly_spaced_and_the_last_is_among_them() -> None:
    assert spaced(6, 12) == [2, 4, 6, 8, 10, 12]
    assert spaced(4, 4) == [1, 2, 3, 4]
    assert spaced(3, 4) == [1, 3, 4]
    assert spaced(1, 12) == [12]


def test_a_student_as_wide_as_its_teacher_starts_with_its_layers() -> None:
    teacher = bert(4, 16)
    student, basis = student_of(teacher, Plan(), 0.0)
    assert basis is None
    assert student.config.num_hidden_layers == 2
    theirs = teacher.state_dict()
    for name, weights in student.state_dict().items():
        source = re.sub(r"(?<=layer\.)\d", lambda found: {"0": "1", "1": "3"}[found[0]], name)
        assert torch.equal(weights, theirs[source]), name
    whole, _ = student_of(teacher, Plan(layers=4), 0.0)
    ids = torch.arange(1, 13).reshape(2, 6)
    assert torch.equal(whole.eval()(ids).logits, teacher(ids).logits)


def test_a_narrower_student_starts_with_the_principal_directions_of_the_embeddings() -> None:
    teacher = bert(2, 32)
    words = teacher.bert.embeddings.word_embeddings.weight
    with torch.no_grad():  # of rank 8 and a little noise
        words.copy_(torch.randn(50, 8) @ torch.randn(8, 32) + 1e-3 * torch.randn(50, 32))
    student, basis = student_of(teacher, Plan(1, 8), 0.0)
    assert (student.config.hidden_size, student.config.num_attention_heads) == (8, 1)
    assert student.config.intermediate_size == 32
    assert basis is not None
    back = Apprentice(student, teacher.config, basis).projections[0](student.bert.embeddings.word_embeddings.weight)
    assert torch.allclose(back, words, atol=0.02)


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [(Plan(3), "no smaller"), (Plan(1, 64), "no smaller"), (Plan(1, 12), "multiple of 8")],
)
def test_students_that_cannot_be(plan: Plan, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        student_of(bert(2, 16), plan, 0.0)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher: Path) -> None:
    parts = split(Table(TEXTS, LABELS))
    with processes() as team:
        school = Teachers([teacher], parts.labels, team.device)
        encoder = school.encoders[0]

        def loss(plan: Plan, further: list[str]) -> tuple[Distillation, float]:
            student, _ = student_of(school.models[0], plan, 0.0)
            task = Distillation(parts, further, encoder, Settings(), plan, school, team)
            task.epoch(0)
            rows = [0, 5, len(task.texts) - 1]
            return task, float(task.loss(Apprentice(student.eval(), school.models[0].config, None), rows).detach())

        same = Plan(layers=3, label_weight=0.0)
        assert loss(same, [])[1] == pytest.approx(0, abs=1e-5)
        smaller = Plan(layers=1, label_weight=0.0)
        assert loss(smaller, [])[1] > loss(Plan(1, label_weight=0.0, hidden_weight=0.0), [])[1] > 0.01
        # Rows with labels bring the labels' loss, the one without does not.
        task, found = loss(Plan(layers=3, label_weight=1.0, hidden_weight=0.0), ["新 到 商 品"])
        targets = task.targets[[0, 5]]
        expected = F.cross_entropy(
            torch.from_numpy(logits_of(school.models[0], [task.tokens[i] for i in (0, 5)], "")),
            targets,
            reduction="sum",
        )
        assert found == pytest.approx(float(expected), rel=1e-3)


def test_teachers_are_averaged_whatever_the_order_of_their_categories(teacher: Path, tmp_path: Path) -> None:
    turned = tmp_path / "turned"
    turned.mkdir()
    for file in teacher.iterdir():
        (turned / file.name).write_bytes(file.read_bytes())
    labels = read_labels(teacher)
    write_json(turned / "labels.json", labels[::-1])
    with processes() as team:
        straight = Teachers([teacher], labels, team.device).probabilities(TEXTS[:5], 2.0)
        both = Teachers([teacher, turned], labels, team.device).probabilities(TEXTS[:5], 2.0)
    assert torch.allclose(both, (straight + straight.flip(1)) / 2, atol=1e-6)
    assert torch.allclose(both.sum(dim=1), torch.ones(5))


def test_the_svm_teaches_beside_them_and_knows_varied_texts_by_their_originals(teacher: Path) -> None:
    train = split(Table(TEXTS, LABELS)).train
    labels = read_labels(teacher)
    linear = LinearTeacher(train, labels)
    varied = ["苹果"] * 5
    with processes() as team:
        alone = Teachers([teacher], labels, team.device).probabilities(varied, 2.0)
        both = Teachers([teacher], labels, team.device, linear, 0.25).probabilities(varied, 2.0, train.texts[:5])
    svm = torch.from_numpy(linear.logits(train.texts[:5]) / 2).softmax(dim=1)
    assert torch.allclose(both, 0.75 * alone + 0.25 * svm, atol=1e-6)


def test_a_student_is_a_checkpoint_like_any_other(teacher: Path, fruit: Path, tmp_path: Path) -> None:
    further = [("红富士苹果 脆甜 批发", ""), ("手机壳 透明", ""), *FRUIT[:3]]
    extra = table(tmp_path / "more.csv", further)
    out = tmp_path / "student"
    result = distil(
        [teacher, teacher],
        fruit,
        "text",
        "category",
        out,
        QUICK,
        Plan(1, 64, hidden_weight=0.5, linear_share=0.5),
        extra=[extra],
    )
    assert result["accuracy"] > 0.9
    assert result["teachers"]["accuracy"] > 0.9
    assert result["rows"]["extra"] == sum(not is_held_out(text) for text, _ in further[:2])
    assert result["parameters"]["student"] < result["parameters"]["teacher"] / 2
    model = load_model(out)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (1, 64)
    assert model.config.vocab_size == Encoder(out / "tokenizer.json").vocabulary
    with safe_open(out / "model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if "projections" in name]  # noqa: SIM118
    training = json.loads((out / "training.json").read_text())
    assert training["data"]["plan"]["layers"] == 1
    assert (out / "sample.jsonl").is_file()


def test_a_student_may_start_from_another_bert(
    teacher: Path, fruit: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    folder = tmp_path / "bert"
    characters = sorted({c for text in TEXTS for c in text if c != " "})
    folder.mkdir()
    vocabulary = [*SPECIAL, *characters, *("##" + c for c in characters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    out = tmp_path / "out"
    told = ["--model", folder, "--epochs", 6, "--batch-size", 8, "--learning-rate", 3e-3, "--no-prune"]
    assert command("distil", teacher, "--data", fruit, "-o", out, *told)["accuracy"] > 0.9
    assert load_model(out).config.hidden_size == 32
    assert Encoder(out / "tokenizer.json").vocabulary == len(vocabulary)


def test_a_stopped_distillation_goes_on(
    teacher: Path, fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Settings(epochs=1, batch_size=8, augment=("swap",))
    validate = Distillation.validate

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Distillation, "validate", stop)
    with pytest.raises(KeyboardInterrupt):
        distil([teacher], fruit, "text", "category", tmp_path / "stopped", told, Plan(1), save_every=3)
    monkeypatch.setattr(Distillation, "validate", validate)
    capsys.readouterr()
    for name in ("stopped", "unbroken"):
        distil([teacher], fruit, "text", "category", tmp_path / name, told, Plan(1), save_every=3)
    assert "going on after step" in capsys.readouterr().err
    ours, theirs = (load_model(tmp_path / name).state_dict() for name in ("stopped", "unbroken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_teacher_and_table_must_have_the_same_categories(teacher: Path, tmp_path: Path) -> None:
    other = table(tmp_path / "a.csv", [(text, label + "类") for text, label in FRUIT])
    with pytest.raises(InputError, match="is not in both"):
        distil([teacher], other, "text", "category", tmp_path / "out", QUICK, Plan())


@pytest.fixture
def wordpiece(tmp_path: Path) -> Path:
    """A tokenizer as BERT's own, with pieces that begin a word and such that go on with one."""
    pieces = [
        "phone",
        "case",
        "cas",
        "blue",
        "##tooth",
        "##case",
        "##s",
        "##t",
        "s",
        "t",
        "手",
        "机",
        "壳",
        "犇",
        "##犇",
    ]
    pieces += ["b", "##b", "##l", "##u", "##e", "##o", "##h"]
    (tmp_path / "vocab.txt").write_text("\n".join(["[unused]", *SPECIAL, *pieces]) + "\n", "utf-8")
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    return tmp_path / "tokenizer.json"


def test_a_pruned_tokenizer_cuts_the_texts_into_the_same_pieces(wordpiece: Path) -> None:
    tokenizer = Tokenizer.from_file(str(wordpiece))
    texts = ["手机壳 phonecases", "Bluetooth phone", "手机 x", "phone " * 300 + "cases"]
    pruned = shrink(tokenizer, needed(tokenizer, texts, 1))
    for each in (tokenizer, pruned):
        each.enable_truncation(400)
    for text in texts:
        before, after = tokenizer.encode(text), pruned.encode(text)
        assert after.tokens == before.tokens
        assert (after.tokens[0], after.tokens[-1]) == ("[CLS]", "[SEP]")
        assert [pruned.id_to_token(number) for number in after.ids] == after.tokens
    kept = pruned.get_vocab()
    assert sorted(kept.values()) == list(range(len(kept)))
    assert {"phone", "case", "##case", "##tooth", "##s", "s", *SPECIAL} <= kept.keys()
    assert not kept.keys() & {"cas", "犇", "##犇", "[unused]"}


def test_rare_pieces_are_cut_finer_and_never_unknown(wordpiece: Path) -> None:
    tokenizer = Tokenizer.from_file(str(wordpiece))
    texts = ["phone"] * 3 + ["bluetooth"]
    assert shrink(tokenizer, needed(tokenizer, texts, 2)).encode("phone bluetooth").tokens[1:-1] == [
        "phone",
        *("b", "##l", "##u", "##e", "##t", "##o", "##o", "##t", "##h"),
    ]


def test_a_pruned_sentencepiece_vocabulary_cuts_the_texts_into_the_same_pieces() -> None:
    tokenizer = sentencepiece(TEXTS)
    texts = [*TEXTS[::2], "苹果 汉 苹果", "zzz 红富士"]
    pruned = shrink(tokenizer, needed(tokenizer, texts, 1))
    for text in texts:
        before, after = tokenizer.encode(text), pruned.encode(text)
        assert after.tokens == before.tokens
        assert (after.tokens[0], after.tokens[-1]) == ("<s>", "</s>")
        assert [pruned.id_to_token(number) for number in after.ids] == [
            tokenizer.id_to_token(number) for number in before.ids
        ]
    kept = pruned.get_vocab()
    assert sorted(kept.values()) == list(range(len(kept)))
    assert len(kept) < tokenizer.get_vocab_size()
    assert {*MULTILINGUAL} <= kept.keys()


def test_only_wordpiece_and_sentencepiece_are_pruned(wordpiece: Path) -> None:
    told = json.loads(wordpiece.read_text())
    told["model"] = {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
    told["added_tokens"], told["post_processor"] = [], None
    with pytest.raises(InputError, match="WordLevel vocabulary cannot be pruned"):
        needed(Tokenizer.from_str(json.dumps(told)), ["a"], 1)


def test_a_pruned_model_answers_its_texts_as_before(teacher: Path, tmp_path: Path) -> None:
    model, encoder = load_model(teacher), Encoder(teacher / "tokenizer.json")
    texts = TEXTS[::3]
    before = logits_of(model, encoder.tokens(texts), "before")
    pruned, sizes = prune_vocabulary(model, encoder, texts, tmp_path)
    assert (logits_of(model, pruned.tokens(texts), "after") == before).all()
    assert pruned.vocabulary == sizes["vocabulary"]["after"] < encoder.vocabulary
    assert model.get_input_embeddings().weight.shape[0] == pruned.vocabulary


def test_the_command_writes_a_checkpoint_that_answers_as_before(
    checkpoint: Path, sample: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    few = tmp_path / "few.csv"
    few.write_text("".join(sample.read_text("utf-8").splitlines(keepends=True)[:400]), "utf-8")
    result = command("prune", checkpoint, "--data", few, "-o", tmp_path / "pruned")
    assert result["vocabulary"]["after"] < result["vocabulary"]["before"]
    assert result["bytes"]["after"] < result["bytes"]["before"]
    assert 0 < result["agreement"] <= 1
    texts = list(unlabelled([few], "text"))[:50]
    before, after = (
        logits_of(load_model(folder), Encoder(folder / "tokenizer.json").tokens(texts), "")
        for folder in (checkpoint, tmp_path / "pruned")
    )
    assert (before == after).all()
    training = json.loads((tmp_path / "pruned" / "training.json").read_text())
    assert training["pruning"]["least"] == 1
    assert training["settings"]["epochs"] == 8


def test_the_frontier_is_measured_through_triton(
    checkpoint: Path, sample: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    page = tmp_path / "frontier.html"
    result = command("frontier", checkpoint, "--data", sample, "-o", page, "--precision", "fp32", "--seconds", 0.5)
    (row,) = result["rows"]
    served = evaluate(sample, "text", "category", checkpoint=checkpoint, held_out=True)
    assert row["accuracy"] == pytest.approx(served["accuracy"], abs=0.002)
    assert row["macro_f1"] == pytest.approx(served["macro_f1"], abs=0.005)
    assert result["held_out_texts"] == served["rows"]
    assert row["texts_per_second"] > 0
    assert row["best"]
    assert json.loads(page.with_suffix(".json").read_text()) == result
    assert "<svg" in page.read_text()


def test_an_engine_is_on_the_frontier_unless_another_beats_it() -> None:
    figures = [(100, 0.9), (200, 0.8), (100, 0.8), (50, 0.9), (200, 0.8)]
    rows = judge([{"texts_per_second": speed, "accuracy": right} for speed, right in figures] + [{"gate": "FAILED"}])
    assert [row.get("best") for row in rows] == [True, True, False, False, True, None]
    assert rows[1]["speedup"] == 2


def test_a_frontier_needs_a_table_that_its_checkpoints_know(
    checkpoint: Path, fruit: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    with pytest.raises(InputError, match="'水果' of"):
        command("frontier", checkpoint, "--data", fruit, "-o", tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
