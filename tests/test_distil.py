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

from aisle.commands.app import app
from aisle.errors import InputError
from aisle.pipelines.frontier import mark_best
from aisle.preprocess.clean import LabelledTexts
from aisle.preprocess.encode import MULTILINGUAL, SPECIAL
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.linear import LinearTeacher
from aisle.train.core.predict import logits_of
from aisle.train.core.processes import processes
from aisle.train.core.settings import StudentSpec, TrainingSettings
from aisle.train.core.split import is_held_out, split
from aisle.train.evaluation.evaluate import evaluate
from aisle.train.fit.distil import Distillation, ProjectedStudent, Teachers, distil, spaced, student_of
from aisle.train.fit.pretrain import unlabelled
from aisle.train.fit.prune import needed, prune_vocabulary, shrink
from aisle.train.fit.train import train

from .conftest import rename_labels
from .test_pretrain import sentencepiece
from .test_train import FRUIT, table

TEXTS, LABELS = [text for text, _ in FRUIT], [label for _, label in FRUIT]
QUICK = TrainingSettings(epochs=8, batch_size=8, patience=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table(tmp_path_factory.mktemp("data") / "fruit.csv", FRUIT)


@pytest.fixture(scope="module")
def teacher(fruit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    settings = TrainingSettings(epochs=8, batch_size=8, patience=4, layers=3, hidden_size=128)
    assert train(fruit, "text", "category", folder, settings)["accuracy"] > 0.9
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
    """Run a command in this process, and return its JSON output."""

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


def test_a_student_of_equal_hidden_size_starts_with_its_teachers_layers() -> None:
    teacher = bert(4, 16)
    student, basis = student_of(teacher, StudentSpec(), 0.0)
    assert basis is None
    assert student.config.num_hidden_layers == 2
    theirs = teacher.state_dict()
    for name, weights in student.state_dict().items():
        source = re.sub(r"(?<=layer\.)\d", lambda found: {"0": "1", "1": "3"}[found[0]], name)
        assert torch.equal(weights, theirs[source]), name
    whole, _ = student_of(teacher, StudentSpec(layers=4), 0.0)
    ids = torch.arange(1, 13).reshape(2, 6)
    assert torch.equal(whole.eval()(ids).logits, teacher(ids).logits)


def test_a_narrower_student_starts_with_the_principal_directions_of_the_embeddings() -> None:
    teacher = bert(2, 32)
    words = teacher.bert.embeddings.word_embeddings.weight
    with torch.no_grad():  # of rank 8 and a little noise
        words.copy_(torch.randn(50, 8) @ torch.randn(8, 32) + 1e-3 * torch.randn(50, 32))
    student, basis = student_of(teacher, StudentSpec(1, 8), 0.0)
    assert (student.config.hidden_size, student.config.num_attention_heads) == (8, 1)
    assert student.config.intermediate_size == 32
    assert basis is not None
    back = ProjectedStudent(student, teacher.config, basis).projections[0](
        student.bert.embeddings.word_embeddings.weight
    )
    assert torch.allclose(back, words, atol=0.02)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [(StudentSpec(3), "not smaller"), (StudentSpec(1, 64), "not smaller"), (StudentSpec(1, 12), "multiple of 8")],
)
def test_impossible_students_are_refused(spec: StudentSpec, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        student_of(bert(2, 16), spec, 0.0)


def test_a_student_equal_to_its_teacher_has_no_loss(teacher: Path) -> None:
    parts = split(LabelledTexts(TEXTS, LABELS))
    with processes() as world:
        teachers = Teachers([Checkpoint(teacher)], parts.labels, world.device)
        tokenizer = teachers.tokenizers[0]

        def loss(spec: StudentSpec, further: list[str]) -> tuple[Distillation, float]:
            student, _ = student_of(teachers.models[0], spec, 0.0)
            task = Distillation(parts, further, tokenizer, TrainingSettings(), spec, teachers, world)
            task.epoch(0)
            rows = [0, 5, len(task.texts) - 1]
            return task, float(
                task.loss(ProjectedStudent(student.eval(), teachers.models[0].config, None), rows).detach()
            )

        same = StudentSpec(layers=3, label_weight=0.0)
        assert loss(same, [])[1] == pytest.approx(0, abs=1e-5)
        smaller = StudentSpec(layers=1, label_weight=0.0)
        assert loss(smaller, [])[1] > loss(StudentSpec(1, label_weight=0.0, hidden_weight=0.0), [])[1] > 0.01
        # Only rows with labels have the loss of the labels.
        task, found = loss(StudentSpec(layers=3, label_weight=1.0, hidden_weight=0.0), ["新 到 商 品"])
        targets = task.targets[[0, 5]]
        expected = F.cross_entropy(
            torch.from_numpy(logits_of(teachers.models[0], [task.tokens[i] for i in (0, 5)], "")),
            targets,
            reduction="sum",
        )
        assert found == pytest.approx(float(expected), rel=1e-3)


def test_teachers_are_averaged_whatever_the_order_of_their_categories(teacher: Path, tmp_path: Path) -> None:
    turned = tmp_path / "turned"
    turned.mkdir()
    for file in teacher.iterdir():
        (turned / file.name).write_bytes(file.read_bytes())
    labels = Checkpoint(teacher).labels
    rename_labels(turned, labels[::-1])
    with processes() as world:
        straight = Teachers([Checkpoint(teacher)], labels, world.device).probabilities(TEXTS[:5], 2.0)
        both = Teachers([Checkpoint(teacher), Checkpoint(turned)], labels, world.device).probabilities(TEXTS[:5], 2.0)
    assert torch.allclose(both, (straight + straight.flip(1)) / 2, atol=1e-6)
    assert torch.allclose(both.sum(dim=1), torch.ones(5))


def test_the_svm_is_a_teacher_and_sees_the_original_texts(teacher: Path) -> None:
    train = split(LabelledTexts(TEXTS, LABELS)).train
    labels = Checkpoint(teacher).labels
    linear = LinearTeacher(train, labels)
    varied = ["苹果"] * 5
    with processes() as world:
        alone = Teachers([Checkpoint(teacher)], labels, world.device).probabilities(varied, 2.0)
        both = Teachers([Checkpoint(teacher)], labels, world.device, linear, 0.25).probabilities(
            varied, 2.0, train.texts[:5]
        )
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
        StudentSpec(1, 64, hidden_weight=0.5, linear_share=0.5),
        extra=[extra],
    )
    assert result["accuracy"] > 0.9
    assert result["teachers"]["accuracy"] > 0.9
    assert result["rows"]["extra"] == sum(not is_held_out(text) for text, _ in further[:2])
    assert result["parameters"]["student"] < result["parameters"]["teacher"] / 2
    model = Checkpoint(out).model
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (1, 64)
    assert model.config.vocab_size == Checkpoint(out).tokenizer.vocabulary
    with safe_open(out / "model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if "projections" in name]  # noqa: SIM118
    training = json.loads((out / "training.json").read_text())
    assert training["data"]["student"]["layers"] == 1
    taught, learnt = Checkpoint(teacher).decisions, Checkpoint(out).decisions
    assert taught
    assert learnt
    assert learnt.targets == taught.targets
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
    options = ["--model", folder, "--epochs", 6, "--batch-size", 8, "--learning-rate", 3e-3, "--no-prune"]
    assert command("distil", teacher, fruit, "-o", out, *options)["accuracy"] > 0.9
    assert Checkpoint(out).model.config.hidden_size == 32
    assert Checkpoint(out).tokenizer.vocabulary == len(vocabulary)


def test_a_stopped_distillation_resumes(
    teacher: Path, fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = TrainingSettings(epochs=1, batch_size=8, augment=("swap",))
    validate = Distillation.validate

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Distillation, "validate", stop)
    with pytest.raises(KeyboardInterrupt):
        distil([teacher], fruit, "text", "category", tmp_path / "stopped", settings, StudentSpec(1), save_every=3)
    monkeypatch.setattr(Distillation, "validate", validate)
    capsys.readouterr()
    for name in ("stopped", "unbroken"):
        distil([teacher], fruit, "text", "category", tmp_path / name, settings, StudentSpec(1), save_every=3)
    assert "resuming after step" in capsys.readouterr().err
    ours, theirs = (Checkpoint(tmp_path / name).model.state_dict() for name in ("stopped", "unbroken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_teacher_and_table_must_have_the_same_categories(teacher: Path, tmp_path: Path) -> None:
    other = table(tmp_path / "a.csv", [(text, label + "类") for text, label in FRUIT])
    with pytest.raises(InputError, match="is not in both"):
        distil([teacher], other, "text", "category", tmp_path / "out", QUICK, StudentSpec())


@pytest.fixture
def wordpiece(tmp_path: Path) -> Path:
    """A tokenizer like BERT's, with pieces that start a word and pieces that continue one."""
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


def test_rare_pieces_are_split_and_never_unknown(wordpiece: Path) -> None:
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
    spec = json.loads(wordpiece.read_text())
    spec["model"] = {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
    spec["added_tokens"], spec["post_processor"] = [], None
    with pytest.raises(InputError, match="WordLevel vocabulary cannot be pruned"):
        needed(Tokenizer.from_str(json.dumps(spec)), ["a"], 1)


def test_a_pruned_model_gives_the_same_answers(teacher: Path, tmp_path: Path) -> None:
    model, tokenizer = Checkpoint(teacher).model, Checkpoint(teacher).tokenizer
    texts = TEXTS[::3]
    before = logits_of(model, tokenizer.tokens(texts), "before")
    pruned, sizes = prune_vocabulary(model, tokenizer, texts, tmp_path)
    assert (logits_of(model, pruned.tokens(texts), "after") == before).all()
    assert pruned.vocabulary == sizes["vocabulary"]["after"] < tokenizer.vocabulary
    assert model.get_input_embeddings().weight.shape[0] == pruned.vocabulary


def test_the_prune_command_writes_a_checkpoint_with_the_same_answers(
    checkpoint: Path, sample: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    few = tmp_path / "few.csv"
    few.write_text("".join(sample.read_text("utf-8").splitlines(keepends=True)[:400]), "utf-8")
    result = command("prune", checkpoint, few, "-o", tmp_path / "pruned")
    assert result["vocabulary"]["after"] < result["vocabulary"]["before"]
    assert result["bytes"]["after"] < result["bytes"]["before"]
    assert 0 < result["agreement"] <= 1
    texts = list(unlabelled([few], "text"))[:50]
    before, after = (
        logits_of(Checkpoint(folder).model, Checkpoint(folder).tokenizer.tokens(texts), "")
        for folder in (checkpoint, tmp_path / "pruned")
    )
    assert (before == after).all()
    training = json.loads((tmp_path / "pruned" / "training.json").read_text())
    assert training["pruning"]["least"] == 1
    made_of = json.loads((checkpoint / "training.json").read_text())
    assert training["settings"] == made_of["settings"]
    own, again = Checkpoint(checkpoint).decisions, Checkpoint(tmp_path / "pruned").decisions
    assert own
    assert again
    assert again.targets == own.targets
    assert again.rows == len(Checkpoint(checkpoint).sample.validation.texts)  # some of them have other pieces now

    command("prune", checkpoint, sample, "-o", tmp_path / "same")
    assert Checkpoint(tmp_path / "same").decisions == own


@pytest.mark.long
def test_the_frontier_is_measured_through_triton(
    checkpoint: Path, sample: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    page = tmp_path / "frontier.html"
    result = command("frontier", checkpoint, sample, "--report", page, "--precisions", "fp32", "--seconds", 0.5)
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
    rows = mark_best(
        [{"texts_per_second": speed, "accuracy": right} for speed, right in figures] + [{"gate": "FAILED"}]
    )
    assert [row.get("best") for row in rows] == [True, True, False, False, True, None]
    assert rows[1]["speedup"] == 2


def test_a_frontier_needs_a_table_that_its_checkpoints_know(
    checkpoint: Path, fruit: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    with pytest.raises(InputError, match="'水果' of"):
        command("frontier", checkpoint, fruit, "--report", tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
