import json
from pathlib import Path
from typing import Any

import pytest

from aisle.errors import InputError
from aisle.pipelines.stages import BASELINE, measure_stages
from aisle.train.core.settings import TrainingSettings

STEPS = {BASELINE, "from scratch", "with augmentation", "pretrained", "distilled", "distilled, INT8"}


@pytest.mark.long
def test_a_run_takes_every_step_and_resumes(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    rows = [
        {"text": f"{'新鲜苹果 斤' if i % 2 else '防摔手机壳 款'}{i // 2}", "category": "ab"[i % 2]} for i in range(800)
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(epochs: int = 6, seeds: int = 1) -> dict[str, Any]:
        told = TrainingSettings(epochs=epochs, max_tokens=16, layers=1, hidden_size=64, augment=("swap",))
        return measure_stages(table, "text", "category", tmp_path / "stages", told, pretraining_epochs=1, seeds=seeds)

    first = run()
    assert {row["step"] for row in first["steps"]} == STEPS
    assert {row["seeds"] for row in first["steps"]} == {1}
    assert min(row["accuracy"] for row in first["steps"] if row["step"] != "pretrained") > 0.9
    folder = tmp_path / "stages"
    assert json.loads((folder / "stages.json").read_text()) == json.loads(json.dumps(first))
    assert (folder / "report.html").read_text().count("<svg") == 1
    settings = json.loads((folder / "seed-0" / "with-augmentation" / "training.json").read_text())["settings"]
    assert settings["augment"] == ["swap"]
    assert json.loads((folder / "seed-0" / "pretrained" / "training.json").read_text())["settings"]["model"] == str(
        folder / "language-model"
    )

    weights = folder / "seed-0" / "from-scratch" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    (folder / "stages.json").write_text(json.dumps({**first, "runs": first["runs"][:-1]}))
    assert run()["steps"] == first["steps"]
    assert weights.stat().st_mtime_ns == written

    # With another seed there are more teachers: all students are trained again by the same teachers.
    for more in (run(seeds=2), run(seeds=1)):
        students = [each for each in more["runs"] if each["step"].startswith("distilled")]
        assert sorted((each["step"], each["seed"]) for each in students) == [
            ("distilled", 0),
            ("distilled", 1),
            ("distilled, INT8", 0),
            ("distilled, INT8", 1),
        ]
        assert {len(each["teachers"]) for each in students} == {4}
        assert {row["seeds"] for row in more["steps"]} == {2}
        for seed in range(2):
            made = json.loads((folder / f"seed-{seed}" / "distilled" / "training.json").read_text())
            assert len(made["data"]["teachers"]) == 4

    with pytest.raises(InputError, match="other data or settings"):
        run(epochs=7)
