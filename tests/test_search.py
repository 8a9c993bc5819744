import json
from pathlib import Path

import pytest

from aisle.errors import InputError
from aisle.train.core.settings import TrainingSettings

from .test_train import FRUIT, table

pytest.importorskip("optuna")
from aisle.train.experiments.search import arguments, search


def test_a_search_resumes(tmp_path: Path) -> None:
    data, out = table(tmp_path / "fruit.csv", FRUIT), tmp_path / "search"
    settings = TrainingSettings(epochs=1, max_tokens=32)
    first = search(data, "text", "category", out, settings, trials=2)
    more = search(data, "text", "category", out, settings, trials=3)
    assert [len(result["trials"]) for result in (first, more)] == [2, 3]
    assert more["trials"][:2] == first["trials"]
    assert more["trials"][0]["settings"]["dropout"] == settings.dropout
    assert len({trial["settings"]["learning_rate"] for trial in more["trials"]}) == 3
    assert more["best"]["score"] == max(trial["score"] for trial in more["trials"])
    assert json.loads((out / "search.json").read_text())["trials"] == more["trials"]
    assert "--epochs 1 --max-tokens 32 " in more["train_with"]
    assert "--learning-rate" in more["train_with"]

    with pytest.raises(InputError, match="other data or settings"):
        search(data, "text", "category", out, TrainingSettings(epochs=2), trials=4)


def test_the_best_settings_are_shown_as_options() -> None:
    told = arguments({"learning_rate": 0.000123, "batch_size": 64, "augment": ("swap", "drop")})
    assert told == ["--learning-rate", "0.000123", "--batch-size", "64", "--augment", "swap", "--augment", "drop"]
