"""Engines of BERTs from elsewhere: a folder with configuration, weights and vocab.txt, and some texts."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from aisle.build.build import build
from aisle.build.engine import load_engine
from aisle.build.inputs import TextSource
from aisle.build.repository import check_version, read_report
from aisle.errors import InputError
from aisle.preprocess.encode import TextTokenizer

from .conftest import aisle

CHARACTERS = "红富士苹果手机壳防摔蓝牙耳机降噪猫粮成洗发水usbcable0123456789"
LABELS = ["生鲜 > 水果", "C++ books", "½ price"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rng = random.Random(0)
    rows = ["".join(rng.choices(CHARACTERS, k=rng.randint(4, 30))) for _ in range(300)]
    path.write_text("".join(json.dumps({"title": row}) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier as transformers saves it, in fp16, with a vocabulary and no fast tokenizer."""
    folder = tmp_path_factory.mktemp("foreign") / "shop-bert"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(CHARACTERS)]
    vocabulary += [f"##{character}" for character in dict.fromkeys(CHARACTERS) if character.isascii()]
    torch.manual_seed(0)
    names = dict(enumerate(LABELS))
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 128}
    config = BertConfig(
        vocab_size=len(vocabulary), **size, num_labels=3, id2label=names, label2id={v: k for k, v in names.items()}
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(30)  # clear predictions, so that rounding changes none
    model.half().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    return folder


def test_another_classifier_is_built_with_its_own_labels_and_vocabulary(
    foreign: Path, texts: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    result = build(foreign, repository, "openvino", "fp32", held_out=TextSource(texts, "title"))
    assert (result["agreement"], result["held_out_texts"]) == (1.0, 150)  # the other half is for calibration
    files = check_version(repository, 1)
    assert json.loads(files["labels.json"].read_text("utf-8")) == LABELS
    asked = ["红富士苹果", "usb cable 2", "猫粮 成猫"]
    tokenizer = AutoTokenizer.from_pretrained(foreign)
    tokens = TextTokenizer(files["tokenizer.json"]).tokens(asked)
    assert tokens == [tokenizer(text)["input_ids"] for text in asked]
    logits = load_engine(repository / "encoder" / "1")(np.concatenate(tokens), np.array(list(map(len, tokens))))
    model = BertForSequenceClassification.from_pretrained(foreign, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = [model(torch.tensor([ids])).logits[0].numpy() for ids in tokens]
    assert np.abs(logits - np.array(expected)).max() < 1e-3
    again = build(foreign, repository, "openvino", "fp32", held_out=TextSource(texts, "title"))
    assert (again["version"], again["reused"]) == (1, True)


@pytest.mark.long
def test_int8_is_calibrated_on_texts_that_the_gate_does_not_see(foreign: Path, texts: Path, tmp_path: Path) -> None:
    done = aisle(
        *("build", foreign, "--repository", tmp_path / "repository", "--held-out", texts, "--text-column", "title"),
        *("--target", "openvino", "--json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["precision"], result["held_out_texts"]) == ("int8", 150)
    assert read_report(tmp_path / "repository", 1)["calibration"].keys() == {"minmax", "percentile", "entropy"}


def test_unsupported_models_are_refused_in_one_line(foreign: Path, texts: Path, tmp_path: Path) -> None:
    def refusal(**changes: object) -> str:
        folder = tmp_path / "spoilt"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(foreign, folder)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        for name, value in changes.items():
            if name.startswith("without_"):
                (folder / str(value)).unlink()
        settings = {name: value for name, value in changes.items() if not name.startswith("without_")}
        (folder / "config.json").write_text(json.dumps({**config, **settings}), "utf-8")
        with pytest.raises(InputError) as refused:
            build(folder, tmp_path / "repository", "openvino", "fp32", held_out=TextSource(texts, "title"))
        return str(refused.value)

    assert "only these can be trained and served: albert, bert" in refusal(model_type="gpt2")
    assert "not a RobertaForSequenceClassification" in refusal(model_type="roberta")
    assert "has no categories yet" in refusal(architectures=["BertForMaskedLM"])
    assert "several categories at once" in refusal(problem_type="multi_label_classification")
    assert "only absolute ones" in refusal(position_embedding_type="relative_key")
    assert "must name two or more different categories" in refusal(id2label={"0": "a", "1": "a", "2": "b"})
    assert "must name two or more different categories" in refusal(id2label={"0": "a", "2": "b"})
    assert 'has no id2label; name its categories there, as {"0": "a", "1": "b"}' in refusal(id2label=None)
    assert "the weights cannot be loaded" in refusal(id2label={"0": "a", "1": "b"})
    assert "has no tokenizer" in refusal(without_vocabulary="vocab.txt")
    assert "model.safetensors is missing" in refusal(without_weights="model.safetensors")


def test_a_configuration_that_is_no_object_is_refused(foreign: Path, texts: Path, tmp_path: Path) -> None:
    shutil.copytree(foreign, tmp_path / "spoilt")
    (tmp_path / "spoilt" / "config.json").write_text("[]", "utf-8")
    with pytest.raises(InputError, match="it holds no JSON object"):
        build(tmp_path / "spoilt", tmp_path / "repository", "openvino", "fp32", held_out=TextSource(texts, "title"))


@pytest.mark.long
def test_pickled_weights_are_refused_with_the_command_that_converts_them(foreign: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(foreign, old)
    (old / "model.safetensors").unlink()
    model = BertForSequenceClassification.from_pretrained(foreign)
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    done = aisle("build", old, "--repository", tmp_path / "repository")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    _, _, command = done.stderr.strip().partition("build old-safetensors: ")
    words = shlex.split(command)
    assert words[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, check=True, capture_output=True)
    converted = BertForSequenceClassification.from_pretrained(tmp_path / "old-safetensors").state_dict()
    assert all(torch.equal(value, converted[name]) for name, value in model.state_dict().items())
    assert (tmp_path / "old-safetensors" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("no/such/folder", "no such folder"), ("./missing", "no such folder"), ("nobody/no-such-model", "HF_HUB")],
)
@pytest.mark.long
def test_a_missing_model_is_one_line(name: str, complaint: str, tmp_path: Path) -> None:
    done = aisle("build", name, "--repository", tmp_path, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert complaint in done.stderr


def test_too_few_texts_are_refused(foreign: Path, texts: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(texts.read_text("utf-8").splitlines(keepends=True)[:40]), "utf-8")
    with pytest.raises(InputError, match=r"40 usable texts are too few; give at least 128"):
        build(foreign, tmp_path / "repository", "openvino", "fp32", held_out=TextSource(few, "title"))
    with pytest.raises(InputError, match=r"--held-out"):
        build(foreign, tmp_path / "repository", "openvino", "fp32")
