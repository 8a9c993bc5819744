import json
from pathlib import Path
from typing import Any

import pytest

from aisle.errors import InputError
from aisle.train.settings import Settings
from aisle.train.study import BASELINE, study

STEPS = {BASELINE, "from scratch", "with augmentation", "pretrained", "distilled", "distilled, INT8"}


def test_a_study_takes_every_step_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    rows = [
        {"text": f"{'新鲜苹果 斤' if i % 2 else '防摔手机壳 款'}{i // 2}", "category": "ab"[i % 2]} for i in range(800)
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(epochs: int = 6) -> dict[str, Any]:
        told = Settings(epochs=epochs, max_tokens=16, layers=1, hidden_size=64, augment=("swap",))
        return study(table, "text", "category", tmp_path / "study", told, pretraining_epochs=1, seeds=1)

    first = run()
    assert {row["step"] for row in first["steps"]} == STEPS
    assert {row["seeds"] for row in first["steps"]} == {1}
    assert min(row["accuracy"] for row in first["steps"] if row["step"] != "pretrained") > 0.9
    folder = tmp_path / "study"
    assert json.loads((folder / "study.json").read_text()) == json.loads(json.dumps(first))
    assert (folder / "report.html").read_text().count("<svg") == 1
    settings = json.loads((folder / "seed-0" / "with-augmentation" / "training.json").read_text())["settings"]
    assert settings["augment"] == ["swap"]
    assert json.loads((folder / "seed-0" / "pretrained" / "training.json").read_text())["settings"]["model"] == str(
        folder / "language-model"
    )

    weights = folder / "seed-0" / "from-scratch" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    (folder / "study.json").write_text(json.dumps({**first, "runs": first["runs"][:-1]}))
    assert run()["steps"] == first["steps"]
    assert weights.stat().st_mtime_ns == written

    with pytest.raises(InputError, match="other data or settings"):
        run(epochs=7)
