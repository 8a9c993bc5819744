"""Adding, merging, renaming and moving categories: what the new checkpoint holds, and what is refused."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import logsumexp

from aisle.build.build import build
from aisle.errors import InputError
from aisle.preprocess.clean import prepare
from aisle.preprocess.labels import Labelling
from aisle.preprocess.tables.table import read_rows
from aisle.train.adapt.retrain import read_corrections, retrain
from aisle.train.categories import add as adding
from aisle.train.categories import names
from aisle.train.categories.add import add
from aisle.train.categories.change import merge, rename
from aisle.train.categories.decisions import carried, undecided
from aisle.train.categories.prototype import Inputs, Row, fit_row, merged_row, new_row
from aisle.train.categories.source import features, layer_of
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.decision_fit import fit_decisions
from aisle.train.core.decisions import Decisions, levels_of
from aisle.train.core.predict import logits_of
from aisle.train.core.settings import DecisionTargets
from aisle.train.core.split import is_held_out, is_validation
from aisle.train.evaluation.evaluate import evaluate
from aisle.train.fit.decide import decide

from .conftest import aisle

NEW = "宠物 > 猫砂 > 豆腐猫砂"
LITTER = ("豆腐猫砂", "膨润土猫砂 除臭", "混合猫砂 结团", "cat litter", "tofu cat litter")


def titles(count: int) -> list[str]:
    rng = random.Random(3)
    return [f"{rng.choice(LITTER)} {rng.randint(2, 99)}kg {rng.choice(LITTER)} {number}号" for number in range(count)]


def written(path: Path, texts: Sequence[str], column: str = "text") -> Path:
    path.write_text(f"{column}\n" + "".join(f"{text}\n" for text in texts), "utf-8")
    return path


def refused(done: subprocess.CompletedProcess[str], complaint: str) -> None:
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not done.stdout


def training(folder: Path) -> Any:
    return json.loads((folder / "training.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("examples") / "litter.csv", titles(30))


@pytest.fixture(scope="module")
def added(checkpoint: Path, examples: Path) -> Path:
    """The checkpoint with a new category."""
    out = examples.with_name("added")
    done = aisle("category", "add", checkpoint, NEW, "--examples", examples, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith(f"checkpoint in {out}; next: aisle deploy {out}\n")
    result = json.loads(done.stdout)
    assert result["examples"]["learnt"] + result["examples"]["held_out"] == 30
    assert result["held_out"]["before"] - result["held_out"]["after"] <= 0.002
    return out


# ---- adding


def test_the_old_rows_and_thresholds_stay(checkpoint: Path, added: Path) -> None:
    old, new = Checkpoint(checkpoint), Checkpoint(added)
    assert new.labels == [*old.labels, NEW]
    assert new.prototypes == [NEW]
    texts = old.sample.held_out.texts[:100]
    logits = [logits_of(each.model, each.tokenizer.tokens(texts), "") for each in (old, new)]
    np.testing.assert_allclose(logits[1][:, :-1], logits[0], atol=1e-5)
    assert old.decisions is not None
    assert new.decisions is not None
    thresholds = [{each.name: each.threshold for each in made.levels[0]} for made in (old.decisions, new.decisions)]
    assert thresholds[1].pop(NEW) is None
    assert thresholds[1] == thresholds[0]
    assert new.decisions.least_probability <= old.decisions.least_probability
    assert new.fingerprint != old.fingerprint


def test_the_new_category_is_found(added: Path) -> None:
    """Texts of the same kind that are no examples; most of them, because the model never read such words."""
    new = Checkpoint(added)
    further = titles(80)[30:]
    best = logits_of(new.model, new.tokenizer.tokens(further), "").argmax(axis=1)
    assert (best == len(new.labels) - 1).mean() > 0.5
    assert new.decisions is not None
    decided = new.decisions.apply(logits_of(new.model, new.tokenizer.tokens(further), ""))
    assert NEW not in {new.decisions.names[i] for i in decided.category}  # nothing shows yet that it is right


def test_examples_are_in_the_sample_by_their_content(checkpoint: Path, added: Path, examples: Path) -> None:
    old, new = Checkpoint(checkpoint).sample, Checkpoint(added).sample
    given = [prepare(row["text"]) for row in read_rows(examples)]
    assert Checkpoint(added).examples.texts == given
    parts = [[text for text, label in zip(part.texts, part.labels, strict=True) if label == NEW] for part in new]
    assert sorted([*parts[0], *parts[1], *parts[2]]) == sorted(given)
    assert all(is_held_out(text) for text in parts[2])
    assert all(is_validation(text) and not is_held_out(text) for text in parts[1])
    assert not any(is_validation(text) or is_held_out(text) for text in parts[0])
    for before, after in zip(old, new, strict=True):
        assert after.texts[: len(before.texts)] == before.texts


def test_held_out_examples_are_not_learnt_from(checkpoint: Path, tmp_path: Path) -> None:
    texts = titles(60)
    learnt = [text for text in texts if not is_held_out(prepare(text))][:12]
    held_out = [text for text in texts if is_held_out(prepare(text))]
    rows = []
    for number, some in enumerate([held_out[:2], held_out[2:6]]):
        out = tmp_path / str(number)
        add(checkpoint, NEW, written(tmp_path / f"{number}.csv", [*learnt, *some]), out)
        rows.append(layer_of(Checkpoint(out)).weight[-1])
    np.testing.assert_array_equal(*rows)


def test_decisions_on_a_new_category_need_texts_of_its_own(added: Path) -> None:
    new = Checkpoint(added)
    made = decide(new, None, "text", "category", DecisionTargets(0.5))
    assert made.levels[0][-1].threshold is None


def test_a_label_that_stands_alone_is_accepted_once_it_has_enough_texts() -> None:
    labels = ["a", "b", "c"]
    few, many = (np.repeat([0, 1, 2], [400, 400, rows]) for rows in (20, 400))
    thresholds = []
    for actual in (many, few):
        logits = 20 * np.eye(3)[actual]
        made = fit_decisions(logits, actual, labels, DecisionTargets(unknown_share=0), alone=["c"])
        thresholds.append([each.threshold is not None for each in made.levels[0]])
    shared = fit_decisions(logits, actual, labels, DecisionTargets(unknown_share=0))
    assert shared.levels[0][2].threshold is not None
    assert thresholds == [[True, True, True], [True, True, False]]


def test_a_category_that_costs_too_much_is_refused(
    checkpoint: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adding, "LOST", 0.3)
    done = aisle("category", "add", checkpoint, NEW, "--examples", examples, "-o", tmp_path / "out", "--json")
    assert done.returncode == 2
    assert "points of accuracy" in done.stderr.splitlines()[-1]
    assert "give more or clearer examples" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_training_table_gives_more_texts(checkpoint: Path, examples: Path, sample: Path, tmp_path: Path) -> None:
    """Also for a classifier that has no sample of its own."""
    folder = tmp_path / "adopted"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copyfile(checkpoint / name, folder / name)
    command = ("category", "add", folder, NEW, "--examples", examples, "-o", tmp_path / "out")
    refused(aisle(*command), "give a table of labelled texts with --data")
    done = aisle(*command, "--data", sample, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accepted"] is None
    assert Checkpoint(tmp_path / "out").labels[-1] == NEW
    assert len(Checkpoint(tmp_path / "out").sample.train.texts) > 500


@pytest.mark.long
def test_a_version_is_built_and_serves_the_new_category(added: Path, tmp_path: Path) -> None:
    result = build(added, tmp_path / "repository", "openvino", "fp32")
    assert result["agreement"] >= 0.999
    encoder = tmp_path / "repository" / "encoder" / "1"
    assert json.loads((encoder / "labels.json").read_text("utf-8"))[-1] == NEW
    assert Decisions.load(encoder, Checkpoint(added).labels) is not None


def test_the_next_retraining_learns_the_examples(added: Path, sample: Path, tmp_path: Path) -> None:
    """The table lacks them. One is corrected, and the correction wins; the checkpoint keeps the examples."""
    label = Checkpoint(added).labels[0]
    text = next(each for each in titles(30) if not is_held_out(prepare(each)))
    corrections = tmp_path / "corrections.csv"
    corrections.write_text(f"text,correct_category\n{text},{label}\n", "utf-8")
    lines = sample.read_text("utf-8").splitlines(keepends=True)
    table = tmp_path / "table.csv"
    table.write_text("".join(lines[:500]), "utf-8")
    again = tmp_path / "again"
    shutil.copytree(added, again)
    history = training(again)
    history["data"]["labelling"] = {"renamed": {}, "fold": False, "min_rows": 2}  # the shortened table has such
    (again / "training.json").write_text(json.dumps(history, ensure_ascii=False), "utf-8")
    retrain(again, table, [corrections], tmp_path / "out", epochs=1)
    new = Checkpoint(tmp_path / "out")
    assert NEW in new.labels
    assert new.prototypes == []  # it is trained now
    assert new.examples == Checkpoint(added).examples
    assert training(new.folder)["data"]["examples"]["rows"] == {NEW: 30}
    of_new = [text for part in new.sample for text, each in zip(part.texts, part.labels, strict=True) if each == NEW]
    assert len(of_new) == 29
    assert prepare(text) not in of_new


# ---- merging, renaming, moving


def leaves(checkpoint: Path) -> list[str]:
    """Return the categories below one level, and first the level."""
    labels = Checkpoint(checkpoint).labels
    level = max({label.rpartition(" > ")[0] for label in labels}, key=lambda path: len(names.below_path(path, labels)))
    return [level, *names.below_path(level, labels)]


def known_labels(folder: Path, table: Path) -> set[str]:
    """Check that all files agree on the labels, and that the checkpoint knows those of its table; return its labels."""
    new = Checkpoint(folder)
    labels = set(new.labels)
    assert new.model.config.id2label == dict(enumerate(new.labels))  # the model is loaded, and so its files agree
    assert new.decisions is not None
    assert {label for part in new.sample for label in part.labels} <= labels
    assert set(json.loads((folder / "metrics.json").read_text("utf-8"))["per_class"]) <= labels
    assert evaluate(table, "text", "category", checkpoint=folder, held_out=True)["unseen_labels"] == []
    return labels


def test_a_category_is_renamed_everywhere(checkpoint: Path, sample: Path, tmp_path: Path) -> None:
    _, first, *_ = leaves(checkpoint)
    rename(checkpoint, first, "新 > 名字", tmp_path / "one")
    rename(tmp_path / "one", "新 > 名字", "新 > 别名", tmp_path / "two")
    assert "新 > 别名" in known_labels(tmp_path / "two", sample)
    assert training(tmp_path / "two")["data"]["labelling"]["renamed"][first] == "新 > 别名"
    assert [each["command"] for each in training(tmp_path / "two")["categories"]] == ["rename", "rename"]
    old, new = Checkpoint(checkpoint), Checkpoint(tmp_path / "two")
    assert (new.folder / "model.safetensors").read_bytes() == (old.folder / "model.safetensors").read_bytes()
    # An old name in corrections is read as the new one.
    (tmp_path / "old.csv").write_text(f"text,correct_category\n猫砂,{first}\n", "utf-8")
    (correction,) = read_corrections([tmp_path / "old.csv"], new.labelling).by_content.values()
    assert correction.label == "新 > 别名"
    # And back again.
    rename(tmp_path / "two", "新 > 别名", first, tmp_path / "three")
    assert Checkpoint(tmp_path / "three").labels == old.labels
    again = Checkpoint(tmp_path / "three").decisions
    assert again is not None
    assert old.decisions is not None
    assert again.levels[0] == old.decisions.levels[0]


def test_a_level_is_moved_with_its_categories(checkpoint: Path, sample: Path, tmp_path: Path) -> None:
    level, *below = leaves(checkpoint)
    done = aisle("category", "move", checkpoint, level, "别处 > 这里", "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["renamed"] == {label: "别处 > 这里" + label[len(level) :] for label in below}
    assert len(below) > 1
    labels = known_labels(tmp_path / "out", sample)
    assert not labels & set(below)
    old, new = Checkpoint(checkpoint).decisions, Checkpoint(tmp_path / "out").decisions
    assert old is not None
    assert new is not None
    upper = {each.name: each.threshold for each in old.levels[1]}
    assert {each.name: each.threshold for each in new.levels[1]}["别处 > 这里"] == upper[level]


def test_merged_categories_have_the_sum_of_their_probabilities(checkpoint: Path, sample: Path, tmp_path: Path) -> None:
    _, first, second, *_ = leaves(checkpoint)
    result = merge(checkpoint, [first, second], first, tmp_path / "out")
    assert result["held_out"]["agreement"] > 0.99
    labels = known_labels(tmp_path / "out", sample)
    assert labels == set(Checkpoint(checkpoint).labels) - {second}
    assert Checkpoint(tmp_path / "out").labelling.renamed[second] == first
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    assert metrics["accuracy"] == pytest.approx(result["held_out"]["after"])
    old, new = Checkpoint(checkpoint), Checkpoint(tmp_path / "out")
    tokens = old.tokenizer.tokens(old.sample.held_out.texts)
    places = [old.labels.index(first), old.labels.index(second)]
    wanted, found = (np.exp(each) for each in (_log_shares(old, tokens, places), _log_shares(new, tokens, [places[0]])))
    assert np.abs(wanted - found).mean() < 0.01


def _log_shares(source: Checkpoint, tokens: Sequence[Sequence[int]], places: list[int]) -> Any:
    logits = logits_of(source.model, tokens, "").astype(np.float64)
    return logsumexp(logits[:, places], axis=1) - logsumexp(logits, axis=1)


def test_an_added_category_is_renamed_and_merged(added: Path, tmp_path: Path) -> None:
    rename(added, NEW, "宠物 > 砂", tmp_path / "renamed")
    renamed = Checkpoint(tmp_path / "renamed")
    assert renamed.prototypes == ["宠物 > 砂"]
    assert set(renamed.examples.labels) == {"宠物 > 砂"}
    merge(renamed.folder, ["宠物 > 砂", renamed.labels[0]], "宠物 > 全", tmp_path / "merged")
    assert Checkpoint(tmp_path / "merged").prototypes == []  # most of its texts were trained
    assert set(Checkpoint(tmp_path / "merged").examples.labels) == {"宠物 > 全"}


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("rename", "没有这个", "x"), "there is no category '没有这个'"),
        (("rename", "{first}x", "x"), "did you mean '{first}'?"),
        (("rename", "{level}", "x"), "rename the level with aisle category move"),
        (("rename", "{first}", "{second}"), "there is already a category"),
        (("rename", "{first}", "{second} "), "there is already a category"),
        (("rename", "{first}", "{first}"), "the new name is the old one"),
        (("rename", "{first}", "{level}"), "is the level above"),
        (("rename", "{first}", " "), "is an empty name"),
        (("rename", "{first}", "A >  > B"), "has an empty level"),
        (("rename", "{first}", "A >\n> B"), "has an empty level"),
        (("rename", "{first}", " {second}\n"), "there is already a category"),
        (("move", "没有 > 这个", "x"), "there is no category"),
        (("move", "{level}", ""), "is an empty name"),
        (("merge", "{first}", "--into", "x"), "name two categories or more"),
        (("merge", "{first}", "{first}", "--into", "x"), "is given twice"),
        (("merge", "{first}", "没有", "--into", "x"), "there is no category '没有'"),
        (("merge", "{all}", "--into", "x"), "all categories would become one"),
        (("merge", "{first}", "{second}", "--into", "{third}"), "there is already a category"),
        (("merge", "{first}", "{second}", "--into", "x", "--text-column", "t"), "needs --data"),
        (("add", "{first}", "--examples", "{examples}"), "there is already a category"),
        (("add", "{level}", "--examples", "{examples}"), "is the level above"),
        (("add", "", "--examples", "{examples}"), "is an empty name"),
        (("add", "x", "--examples", "{few}"), "4 different text(s) are too few for a category; give 5 or more"),
        (("add", "x", "--examples", "{same}"), "1 different text(s) (6 copies and 1 unusable rows left out)"),
        (("add", "x", "--examples", "{taken}"), "are in the training table as"),
        (("add", "x", "--examples", "{examples}", "--text-column", "t"), "no column 't'"),
    ],
)
def test_refused(checkpoint: Path, examples: Path, tmp_path: Path, arguments: tuple[str, ...], complaint: str) -> None:
    level, first, second, third, *_ = leaves(checkpoint)
    taken = Checkpoint(checkpoint).sample.train.texts[:6]
    files = {
        "examples": examples,
        "few": written(tmp_path / "few.csv", titles(4)),
        "same": written(tmp_path / "same.csv", ["猫砂"] * 4 + ["猫砂!", " 猫砂", "猫 砂", "  "]),
        "taken": written(tmp_path / "taken.txt", [*titles(6), *taken]),
    }
    words = {"level": level, "first": first, "second": second, "third": third, **files}
    command, *rest = arguments
    given: list[object] = []
    for each in rest:
        given += Checkpoint(checkpoint).labels if each == "{all}" else [each.format(**words)]
    done = aisle("category", command, checkpoint, *given, "-o", tmp_path / "out")
    refused(done, complaint.format(**words))
    assert not (tmp_path / "out").exists()


def test_the_old_checkpoint_is_not_replaced(checkpoint: Path, added: Path, tmp_path: Path) -> None:
    _, first, *_ = leaves(checkpoint)
    command = ("category", "rename", checkpoint, first, "x", "-o")
    refused(aisle(*command, checkpoint, "--overwrite"), "is the old checkpoint")
    shutil.copytree(checkpoint, tmp_path / "other")
    refused(aisle(*command, tmp_path / "other"), "replace it with --overwrite")
    assert aisle(*command, tmp_path / "other", "--overwrite").returncode == 0
    assert "x" in Checkpoint(tmp_path / "other").labels
    refused(aisle("category", "rename", tmp_path / "missing", first, "x", "-o", tmp_path / "out"), "no such folder")


def test_a_name_that_old_rows_have_is_refused(checkpoint: Path, examples: Path, tmp_path: Path) -> None:
    """The rows of the training table with this label belong to the renamed category."""
    _, first, second, *_ = leaves(checkpoint)
    rename(checkpoint, first, "x", tmp_path / "one")
    with pytest.raises(InputError, match="in the training table belong to 'x'"):
        add(tmp_path / "one", first, examples, tmp_path / "two")
    with pytest.raises(InputError, match="in the training table belong to 'x'"):
        rename(tmp_path / "one", second, first, tmp_path / "two")


# ---- names, thresholds and rows


def test_variants_and_rare_categories_follow_their_category() -> None:
    before = Labelling({"apple": "Apples"}, fold=True, min_rows=5)
    cleaning = {"folded": {"FRUIT": "Fruit", "fruit > Rare": "Fruit > rare"}, "merged": {"Fruit > rare": "Fruit"}}
    after = names.labelling_after(before, cleaning, {"Fruit": "Obst", "Apples": "Äpfel"})
    assert after.renamed == {
        **{"Fruit": "Obst", "FRUIT": "Obst", "Fruit > rare": "Obst", "fruit > Rare": "Obst"},
        **{"apple": "Äpfel", "Apples": "Äpfel"},
    }
    assert (after.fold, after.min_rows) == (True, 5)
    with pytest.raises(InputError, match="belong to 'Fruit'"):
        names.labelling_after(before, cleaning, {"Apples": "FRUIT"})


def test_thresholds_follow_the_labels_that_they_were_fitted_for() -> None:
    labels = ["a > x", "a > y", "b > x", "b > y"]
    actual = np.arange(4000) % 4
    means = 2 * np.eye(4)[actual] + 5 * np.eye(2).repeat(2, axis=1)[actual // 2]
    logits = means + np.random.default_rng(0).normal(size=(4000, 4))
    old = fit_decisions(logits, actual, labels, DecisionTargets(0.97))
    assert all(each.threshold is not None for level in old.levels for each in level)
    new = ["c > x", "a > y", "b > x", "b > y"]
    made = carried(old, undecided(old, new), [frozenset([i]) for i in range(4)])
    assert [each.threshold for each in made.levels[0]] == [each.threshold for each in old.levels[0]]
    upper = {each.name: each.threshold for each in made.levels[1]}
    assert upper == {"c": None, "a": None, "b": old.levels[1][1].threshold}
    assert [[each.name for each in level] for level in made.levels] == levels_of(new)


def test_a_row_is_calibrated_against_the_others() -> None:
    """Texts drawn from the probabilities of a known row give this row back."""
    draw = np.random.default_rng(0)
    features, weight = draw.normal(size=(20_000, 4)), draw.normal(size=(4, 3))
    logits, own = features @ weight, features @ np.array([1.0, -1.0, 0.5, 0.0]) - 0.5
    wanted = (draw.random(20_000) < 1 / (1 + np.exp(logsumexp(logits, axis=1) - own))).astype(float)
    even = np.full(20_000, 1 / 20_000)
    row = fit_row(features, logits, wanted, weights=even, start=np.array([1.0, -1.0, 0.5, 0.0]))
    np.testing.assert_allclose(row.logits(features), own, atol=0.35)


def test_a_new_row_takes_no_more_than_its_share() -> None:
    draw = np.random.default_rng(0)
    actual = draw.integers(0, 4, 2000)
    known = np.eye(6)[actual] + 0.3 * draw.normal(size=(2000, 6))
    others = Inputs(known, 8.0 * known[:, :4])
    fresh = np.eye(6)[[4] * 200] + 0.3 * draw.normal(size=(200, 6))
    examples = Inputs(fresh[:20], 8.0 * fresh[:20, :4])
    correct = others.logits.argmax(axis=1) == actual
    made = new_row(examples, others, correct, 0.001)
    assert (correct & (made.texts >= others.logits.max(axis=1))).sum() <= 2
    assert (made.row.logits(fresh[20:]) > 8 * fresh[20:, :4].max(axis=1)).mean() > 0.7


def test_a_merged_row_agrees_with_the_sum() -> None:
    draw = np.random.default_rng(0)
    actual = draw.integers(0, 5, 1000)
    features = np.eye(8)[actual] + 0.3 * draw.normal(size=(1000, 8))
    weight = 8 * np.eye(5, 8)
    logits = features @ weight.T
    row: Row = merged_row(weight, features, logits, [1, 3])
    exact = np.column_stack([logits[:, [0, 2, 4]], logsumexp(logits[:, [1, 3]], axis=1)])
    made = np.column_stack([logits[:, [0, 2, 4]], row.logits(features)])
    assert (exact.argmax(axis=1) == made.argmax(axis=1)).mean() > 0.97


def test_logits_are_linear_in_the_features(checkpoint: Path, added: Path) -> None:
    for folder in (checkpoint, added):
        source = Checkpoint(folder)
        texts = source.sample.held_out.texts[:70]
        expected = logits_of(source.model, source.tokenizer.tokens(texts), "")
        np.testing.assert_allclose(layer_of(source).logits(features(source, texts, "")), expected, atol=1e-4)
        assert features(source, [], "").shape == (0, 2 * source.model.config.hidden_size)
