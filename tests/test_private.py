"""Training with differential privacy: `aisle train --dp-epsilon`, and the attack that `evaluate --membership` makes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aisle.preprocess.clean import LabelledTexts
from aisle.preprocess.tables.writing import write_rows
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.core.families import EMBEDDINGS
from aisle.train.core.predict import pad
from aisle.train.core.settings import Privacy, TrainingSettings
from aisle.train.core.split import Split, is_validation
from aisle.train.fit import private
from aisle.train.fit.private import CLIP, FAMILIES, Mechanism, PrivateClassification

from .conftest import aisle
from .families import MODELS, random_model, shop_texts, write_model

TOKENS = [[1, 5, 9, 7, 2], [1, 8, 2], [1, 44, 55, 66, 77, 88, 2]]
TARGETS = torch.tensor([0, 1, 2])


class Rows:
    """The losses of three rows of tokens."""

    rate, steps = 0.5, 2

    def loss(self, model: Any, rows: Any) -> torch.Tensor:
        input_ids, attention_mask = pad([TOKENS[row] for row in rows])
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        return torch.nn.functional.cross_entropy(logits, TARGETS[rows], reduction="sum")


def clipped_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Return the sum of the rows' clipped gradients, each row computed on its own."""
    total: dict[str, torch.Tensor] = {}
    for row in range(len(TOKENS)):
        model.zero_grad()
        torch.autograd.backward(Rows().loss(model, [row]))
        own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and not EMBEDDINGS.search(n)}
        norm = float(torch.cat([grad.flatten() for grad in own.values()]).norm())
        for name, grad in own.items():
            total[name] = total.get(name, torch.zeros_like(grad)) + grad * min(1.0, CLIP / norm)
    model.zero_grad()
    return total


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", [name for name, (kind, _) in MODELS.items() if kind in FAMILIES])
def test_a_step_moves_by_the_sum_of_each_texts_clipped_gradient(
    name: str, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "get_noise_multiplier", lambda **_: 0.0)
    model = random_model(name)  # in evaluation mode there is no dropout, but Opacus wants training mode
    expected = clipped_gradients(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = TrainingSettings(batch_size=4, accumulate=accumulate)
    mechanism = Mechanism(Rows(), Privacy(8), settings)  # type: ignore[arg-type]
    mechanism.attach(model.train(), torch.optim.SGD(model.parameters(), lr=1.0))
    mechanism.step(Rows(), [0, 1, 2])  # type: ignore[arg-type]
    mechanism.detach(model)
    for parameter, now in model.named_parameters():
        moved = before[parameter] - now.detach()
        assert torch.allclose(moved, expected.get(parameter, torch.zeros(1)) / 4, atol=1e-6), parameter
    assert not any("grad_sample" in name for name in model.state_dict())


def test_an_empty_batch_still_gets_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "get_noise_multiplier", lambda **_: 2.0)
    model = random_model("bert").train()
    before = model.classifier.weight.detach().clone()
    mechanism = Mechanism(Rows(), Privacy(8), TrainingSettings(batch_size=4))  # type: ignore[arg-type]
    mechanism.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    torch.manual_seed(0)
    mechanism.step(Rows(), [])  # type: ignore[arg-type]
    first = (before - model.classifier.weight).detach()
    assert 0.7 < float(first.std()) / (2.0 * CLIP / 4) < 1.3
    torch.manual_seed(0)  # the seed is public, so it must not decide the noise
    mechanism.step(Rows(), [])  # type: ignore[arg-type]
    assert not torch.allclose((before - first - model.classifier.weight).detach(), first)


def test_batches_are_poisson_samples(checkpoint: Path) -> None:
    texts = [f"红富士苹果 {number}" for number in range(400)]
    part = LabelledTexts(texts, ["a", "b"] * 200)
    parts = Split(part, LabelledTexts(["x"], ["a"]), part, ["a", "b"])
    task = PrivateClassification(
        parts, Checkpoint(checkpoint).tokenizer, TrainingSettings(batch_size=40), torch.device("cpu")
    )
    assert (task.rate, task.steps) == (0.1, 10)
    batches = [batch for epoch in range(60) for batch in task.epoch(epoch)]
    sizes = np.array([len(batch) for batch in batches])
    assert abs(sizes.mean() - 40) < 6 * 6 / len(sizes) ** 0.5  # a binomial distribution: the deviation is 6
    assert 4.5 < sizes.std() < 7.5
    assert all(len(set(batch)) == len(batch) for batch in batches)
    drawn = np.bincount(np.concatenate(batches), minlength=400)
    assert abs(drawn - 60).max() < 6 * 7.4
    assert task.validate(None) is None


@pytest.mark.long
def test_a_smaller_epsilon_takes_more_noise_and_none_is_overspent() -> None:
    noises = []
    rows = Rows()
    rows.rate, rows.steps = 0.05, 10  # the accountant is slow at a high rate
    for epsilon in (2.0, 8.0):
        mechanism = Mechanism(rows, Privacy(epsilon), TrainingSettings(batch_size=4, epochs=5))  # type: ignore[arg-type]
        spent = mechanism.figures()["epsilon"]
        assert epsilon - 0.1 < spent <= epsilon
        assert mechanism.epsilon(5) < spent
        noises.append(mechanism.noise)
    assert noises[0] > noises[1]


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models that have seen no text of the table, and the table: titles with labels that nothing tells."""
    folder = tmp_path_factory.mktemp("public")
    texts = [text for text, _ in shop_texts(100, seed=9)]
    for name in ("bert", "mpnet"):
        write_model(name, folder / name, texts, ["other"], max_position_embeddings=514)
    rng = random.Random(0)
    learnt = (text for text, _ in shop_texts(300) if not is_validation(text))  # so the last epoch's weights stay
    rows = [{"text": text, "category": rng.choice("ab")} for text in learnt]
    write_rows(folder / "data.csv", lambda: iter(rows), ["text", "category"])
    return {"bert": folder / "bert", "mpnet": folder / "mpnet", "data": folder / "data.csv"}


SMALL = ("--max-tokens", 32, "--batch-size", 32)


@pytest.fixture(scope="module")
def trained(public: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "private"
    options = ("--model", public["bert"], *SMALL, "--epochs", 2, "--dp-epsilon", 8, "--dp-delta", 1e-4)
    done = aisle("train", public["data"], "-o", out, *options, "--json")
    assert done.returncode == 0, done.stderr
    assert "differential privacy: epsilon 8 at delta 0.0001" in done.stderr
    return out


def test_the_guarantee_is_in_the_metrics_and_nothing_else_of_the_rows_is_in_the_checkpoint(
    trained: Path, public: dict[str, Path]
) -> None:
    found = json.loads((trained / "metrics.json").read_text())["privacy"]
    rows = json.loads((trained / "metrics.json").read_text())["rows"]["train"]
    assert 7.85 < found["epsilon"] <= 8
    assert found["delta"] == 1e-4
    assert found["clipping_norm"] == CLIP
    assert found["noise_multiplier"] > 0
    assert found["sampling_rate"] == 32 / rows
    assert found["steps"] == 2 * -(-rows // 32)
    assert not {"sample.jsonl", "decisions.json"} & {path.name for path in trained.iterdir()}
    training = json.loads((trained / "training.json").read_text())
    assert [set(epoch) for epoch in training["epochs"]] == [{"epsilon"}] * 2
    assert training["temperature"] == 1
    before, after = (load_file(folder / "model.safetensors") for folder in (public["bert"], trained))
    words = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(before[words], after[words])
    layer = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(before[layer], after[layer])


def test_a_stopped_run_resumes_with_all_its_steps_accounted(
    public: dict[str, Path], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--model", public["bert"], *SMALL, "--epochs", 2, "--dp-epsilon", 8, "--dp-delta", 1e-4)
    first = json.loads((trained / "metrics.json").read_text())["privacy"]
    monkeypatch.setattr(private, "get_noise_multiplier", lambda **_: first["noise_multiplier"])  # it takes seconds
    done = 0
    step = Mechanism.step

    def killed(self: Mechanism, task: Any, batch: list[int]) -> None:
        nonlocal done
        done += 1
        if done == 5:
            raise KeyboardInterrupt
        step(self, task, batch)

    command = ("train", public["data"], "-o", tmp_path / "out", *options, "--save-every", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Mechanism, "step", killed)
        assert aisle(*command).returncode != 0
    again = aisle(*command, "--json")
    assert "resuming after step 4" in again.stderr
    assert json.loads(again.stdout)["privacy"] == first
    # The seed does not decide noise and samples, so another run has other weights.
    weights = [load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "out")]
    assert not torch.equal(*(each["classifier.weight"] for each in weights))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--model", "scratch"], "--model scratch (its vocabulary and word embeddings are made from the texts)"),
        (
            ["--augment", "swap", "--class-floor", 5, "--windows", 2],
            "--augment (it can use other rows), --class-floor (it repeats rows), --windows (which part of a text",
        ),
        (["--mixup", 0.2, "--class-weight", 0.5], "--mixup (it mixes rows), --class-weight (it counts rows)"),
        (["--folds", 3, "--min-rows", 2, "--fold-labels"], "--folds (it trains on each row several times more)"),
        (["--multi-label"], "--multi-label (its thresholds are fitted to rows)"),
        (["--also", "brand"], "--also (it is not made private)"),
        (["--contrastive", "text"], "--contrastive (it compares rows)"),
        (["--log-dir", "log"], "--log-dir (it shows exact losses)"),
        (["--accept-precision", 0.9, "--patience", 3], "needs validation texts, which --dp-epsilon does not read"),
        (["--recipe", "best"], "--dp-epsilon: does not go with --recipe best"),
        (["--dp-delta", 0.1], "--dp-delta 0.1 is too large"),
        (["--model", "MPNET"], "--dp-epsilon cannot train a 'mpnet' model; give one of these: albert, bert"),
        (["--model", "TRAINED"], "give a model that has not seen these texts"),
    ],
)
def test_what_would_break_the_guarantee_is_refused(
    public: dict[str, Path], trained: Path, tmp_path: Path, options: list[Any], complaint: str
) -> None:
    given = [{"MPNET": public["mpnet"], "TRAINED": trained}.get(option, option) for option in options]
    model = [] if "--model" in options else ["--model", public["bert"]]
    done = aisle("train", public["data"], "-o", tmp_path / "out", *SMALL, *model, "--dp-epsilon", 8, *given)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("aisle: ")
    assert complaint in line
    assert not (tmp_path / "out").exists()


def test_a_delta_alone_is_refused(public: dict[str, Path], tmp_path: Path) -> None:
    done = aisle("train", public["data"], "-o", tmp_path / "out", "--dp-delta", 1e-6)
    assert (done.returncode, "--dp-delta: needs --dp-epsilon" in done.stderr) == (2, True)


def attacked(checkpoint: Path, data: Path) -> dict[str, Any]:
    page = checkpoint.with_suffix(".html")
    done = aisle("evaluate", checkpoint, data, "--membership", "--report", page, "--json")
    assert done.returncode == 0, done.stderr
    assert "loss of training texts" in page.read_text("utf-8")
    found: dict[str, Any] = json.loads(done.stdout)["membership"]
    return found


@pytest.mark.long
def test_the_attack_finds_learnt_texts_but_not_those_learnt_privately(
    public: dict[str, Path], trained: Path, tmp_path: Path
) -> None:
    options = ("--model", public["bert"], *SMALL, "--epochs", 30, "--patience", 30, "--learning-rate", 2e-3)
    done = aisle("train", public["data"], "-o", tmp_path / "plain", *options, "--dropout", 0, "--layer-decay", 1)
    assert done.returncode == 0, done.stderr
    before, after = attacked(tmp_path / "plain", public["data"]), attacked(trained, public["data"])
    assert before["members"] == after["members"] > after["others"] > 30
    assert before["auc"] > 0.65
    assert before["loss_of_members"] < before["loss_of_others"]
    assert 0.35 < after["auc"] < 0.65
    assert 0 <= after["found"] < 0.2


def test_the_attack_needs_the_table_of_the_training(trained: Path, sample: Path) -> None:
    done = aisle("evaluate", trained, sample, "--membership")
    assert done.returncode == 2
    assert f"was not trained on {sample}" in done.stderr
    done = aisle("evaluate", sample, "--url", "localhost:1", "--membership")
    assert (done.returncode, "leave out --url" in done.stderr) == (2, True)
