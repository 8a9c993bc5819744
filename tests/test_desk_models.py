"""The desk's pages Quality and Models, on results that the real functions return; no server and no training."""

from __future__ import annotations

import json
import random
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aisle.build.repository import MANIFEST, MODELS
from aisle.client import Prediction
from aisle.deploy.desk import queue
from aisle.deploy.desk.desk import Desk, DeskOptions
from aisle.deploy.desk.jobs import TITLES, Job
from aisle.deploy.desk.languages import translations
from aisle.deploy.desk.pages import models, quality
from aisle.deploy.desk.store import note
from aisle.deploy.server.release import Release, Status
from aisle.preprocess.quality import clean_file
from aisle.train.adapt.drift import verdict
from aisle.train.adapt.drift_log import CELLS, Traffic, WordCounts, time_span
from aisle.train.adapt.drift_statistics import RULES, Reference
from aisle.train.adapt.retrain import _changes, _compare, _notes, _right
from aisle.train.core import metrics
from aisle.train.evaluation.evaluate import measure

from .desk import DeskClient

EVIL = "<script>alert(1)</script>"
CATEGORIES = ("食品 > 水果", "食品 > 零食", "数码 > 配件")


class Pages:
    """A browser without JavaScript, on a desk whose jobs do not run."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        for name in ("old", "repository"):
            (folder / name).mkdir(exist_ok=True)
        (folder / "data.csv").write_text("text,category\n", "utf-8")
        given: dict[str, Any] = {"checkpoint": folder / "old", "data": folder / "data.csv", **options}
        self.desk = Desk(DeskOptions("localhost:1", folder / "desk", repository=folder / "repository", **given))
        self.client = DeskClient(self.desk)

    def get(self, path: str) -> str:
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.text

    def post(self, path: str, **fields: str) -> Any:
        return self.client.act(path, None, **fields)

    def done(self, kind: str, *results: dict[str, Any], **detail: Any) -> Job:
        """Have a job end with these results, and what its page does at the end."""
        with self.desk.store.write() as db:
            number = self.desk.jobs.add(db, kind, [["x"]], "local", **detail)
        return self.end(number, *results)

    def end(self, number: int, *results: dict[str, Any]) -> Job:
        job = self.desk.jobs.get(number)
        assert job
        finish = self.desk.jobs._finish.get(job.kind)
        write = finish(job, list(results)) if finish else None
        with self.desk.store.write() as db:
            if write:
                write(db)
            ended = json.dumps(results, ensure_ascii=False), time.time(), number
            db.execute("UPDATE jobs SET state = 'done', result = ?, ended = ? WHERE id = ?", ended)
        return job

    def agree(self, text: str, category: str, agreed: str) -> None:
        """Have a text in the queue, and agreed."""
        with self.desk.store.write() as db:
            row = {"text": text, "category": category, "confidence": 0.5, "category_2": None, "confidence_2": None}
            queue.add(db, 1, [row])
            db.execute("UPDATE items SET state = 'agreed', agreed = ? WHERE text = ?", (agreed, text))

    def retrained(self) -> dict[str, int | None]:
        with self.desk.store.read() as db:
            return {row["text"]: row["retrained"] for row in db.execute("SELECT text, retrained FROM items")}

    def last_command(self, kind: str) -> list[str]:
        job = self.desk.jobs.last(kind)
        assert job
        return job.commands[-1]


@pytest.fixture
def pages(tmp_path: Path) -> Pages:
    return Pages(tmp_path)


def evaluated(checkpoint: Path | str, categories: tuple[str, ...] = CATEGORIES, rows: int = 60) -> dict[str, Any]:
    """Return an evaluation in which one text in six is confused with the next category."""
    texts = [f"{EVIL} {i}" for i in range(rows)]
    labels = [categories[i % len(categories)] for i in range(rows)]
    answers = []
    for i, label in enumerate(labels):
        other = categories[(i + 1) % len(categories)]
        answers.append(Prediction((other, label) if i % 6 == 0 else (label, other), (0.6 + i % 4 / 10, 0.05)))
    facts = {"data": "data.csv", "held_out": True, "rows": rows, "unseen_labels": [], "skipped": {}, "seconds": 1.0}
    measured = {**measure(texts, labels, answers), "decisions": None}
    return {"evaluated": str(checkpoint), **facts, "texts_per_second": 60.0, **measured}


def drifted(mix: tuple[float, ...]) -> dict[str, Any]:
    """Return what `aisle drift` says of traffic with such a mix of categories."""

    def traffic(rows: int, shares: tuple[float, ...], start: float) -> Traffic:
        draw = np.random.default_rng(0)
        names = draw.choice(np.array(CATEGORIES, np.object_), rows, p=shares)
        lengths = draw.integers(5, 50, rows).astype(float)
        times = start + np.arange(rows, dtype=float)
        return Traffic(times, True, names, draw.uniform(0.5, 1, rows), lengths, [])

    usual, live = traffic(900, (0.4, 0.3, 0.3), 0.0), traffic(1000, mix, 1.7e9)
    usual.words = [WordCounts(0.0, 900, 900, 0.0, np.full(CELLS, 4))]
    figures = {"checkpoint": "old", "log": "log.jsonl", "rows": 1000, "skipped": {}, "reference_rows": 900}
    return {**figures, **time_span(live), **verdict(Reference(usual, 0.9), live)}


def retrained(checkpoint: Path) -> dict[str, Any]:
    """Return what `aisle retrain` says of a checkpoint."""
    texts, labels = [f"{EVIL} {i}" for i in range(6)], [CATEGORIES[i % 3] for i in range(6)]
    old, new = [CATEGORIES[0]] * 6, labels
    by_category = [{"category": CATEGORIES[1], "rows": 2, "right": 1, "unknown": 0.1}]
    return {
        "checkpoint": str(checkpoint),
        "made_of": "old",
        "rows": {"train": 10, "validation": 2, "held_out": 6},
        "corrections": {"rows": 2, "in_table": 1, "added": 1, "blank": 0, "disputed": 0, "new_categories": []},
        "held_out": _compare(labels, old, new),
        "corrections_learnt": _right(labels, [old, new], [0, 1]),
        "corrections_unseen": _right(labels, [old, new], [2]),
        "corrections_by_category": by_category,
        "changes": _changes(texts, labels, old, new),
        "notes": _notes(by_category, 3),
        "seconds": 1.0,
    }


def test_without_a_checkpoint_the_pages_say_how_to_start_the_desk(tmp_path: Path) -> None:
    pages = Pages(tmp_path, checkpoint=None, data=None)
    for page in ("/quality", "/models"):
        assert "Start the desk with --checkpoint and --data" in pages.get(page)
    for path in ("/quality/measure", "/quality/doubtful", "/quality/drift", "/models/retrain"):
        answer = pages.post(path)
        assert answer.status_code == 409
        assert "Start the desk with --checkpoint" in answer.text
    assert pages.desk.jobs.last("evaluate", "doubtful", "drift", "retrain") is None


def test_measuring_runs_evaluate_once(pages: Pages) -> None:
    assert pages.client.get("/quality/calibration.svg").status_code == 404
    answer = pages.post("/quality/measure")
    assert answer.headers["HX-Redirect"] == "/quality"
    old, data = pages.folder / "old", pages.folder / "data.csv"
    named = ["--text-column", "text", "--label-column", "category"]
    assert pages.last_command("evaluate") == ["evaluate", str(old), str(data), "--held-out", *named]
    second = pages.post("/quality/measure")
    assert second.status_code == 409
    assert "running already" in second.text
    assert "Waiting for another job" in pages.get("/quality")


def test_figures_categories_and_confusions_are_shown(pages: Pages) -> None:
    result = evaluated(pages.folder / "old")
    pages.done("evaluate", result)
    page = pages.get("/quality")
    assert f"{result['accuracy']:.2%}" in page
    assert "These are of another checkpoint" not in page
    for name in CATEGORIES:
        assert page.count(f">{name.replace('>', '&gt;')}</th>") == 1  # the matrix adds the number
        assert f"{result['confidence_by_category'][name]:.1%}" in page
    assert 'class="heat-' in page
    assert "<style" not in page
    assert not re.search(r"\sstyle=|\son[a-z]+=", page)


@pytest.mark.parametrize(("sort", "largest_first"), [("precision", False), ("confidence", False), ("rows", True)])
def test_categories_are_sorted_by_a_link(pages: Pages, sort: str, largest_first: bool) -> None:
    result = evaluated(pages.folder / "old")
    pages.done("evaluate", result)
    values = [each[sort] for each in quality._categories(result, sort)]
    assert values == sorted(values, reverse=largest_first)
    page = pages.get(f"/quality?sort={sort}")
    assert page.count("aria-sort=") == 1
    assert "aria-sort=" in pages.get("/quality?sort=nonsense")


def test_a_category_that_is_never_predicted_has_no_confidence_and_comes_last(pages: Pages) -> None:
    result = measure(["1", "2"], ["a", "b"], [Prediction(("a",), (0.9,)), Prediction(("a",), (0.8,))])
    assert [each["name"] for each in quality._categories(result, "confidence")] == ["a", "b"]
    pages.done("evaluate", {**evaluated("x"), **result})
    assert "These are of another checkpoint" in pages.get("/quality")


def test_a_confusion_leads_to_its_texts(pages: Pages) -> None:
    result = evaluated(pages.folder / "old")
    pages.done("evaluate", result)
    links = re.findall(r'href="(/quality/errors[^"]+)"', pages.get("/quality"))
    assert len(links) == 2 * len(result["errors"])  # in the matrix, and in the list
    page = pages.get(links[0].replace("&amp;", "&"))
    group = result["errors"][0]
    assert f"{group['rows']} texts" in page
    assert f"These {metrics.EXAMPLES} have the highest confidence" in page
    assert EVIL not in page
    assert "&lt;script&gt;" in page
    assert pages.client.get("/quality/errors?actual=a&predicted=b").status_code == 404


def test_of_many_categories_the_matrix_has_those_with_the_most_confusions(pages: Pages) -> None:
    names = tuple(f"category {i}" for i in range(metrics.LARGEST_MATRIX + 7))
    result = evaluated("x", names, 470)
    assert result["confusion"] is None
    matrix = quality._matrix(result)
    assert len(matrix) == quality.LARGEST_PART
    for i, row in enumerate(matrix):
        support, recall = (result["per_class"][row["name"]][figure] for figure in ("support", "recall"))
        assert row["cells"][i]["rows"] == round(support * recall)
    pages.done("evaluate", result)
    page = pages.get("/quality")
    assert "The matrix has the 30 categories with the most confusions." in page
    for link in re.findall(r'href="(/quality/errors[^"]+)"', page):
        pages.get(link.replace("&amp;", "&"))


def test_the_matrix_has_the_counts_of_the_evaluation() -> None:
    result = evaluated("x")
    counts = [[cell["rows"] for cell in row["cells"]] for row in quality._matrix(result)]
    assert counts == result["confusion"]["counts"]
    perfect = measure(["1", "2"], ["a", "b"], [Prediction(("a",), (0.9,)), Prediction(("b",), (0.8,))])
    assert quality._matrix({**perfect, "confusion": None}) == []


def test_charts_are_svg_that_the_security_policy_allows(pages: Pages) -> None:
    pages.done("evaluate", evaluated(pages.folder / "old"))
    pages.done("drift", drifted((0.4, 0.3, 0.3)))
    pages.done("drift", drifted((0.1, 0.1, 0.8)))
    for name in ("calibration", "drift", "drift-history"):
        answer = pages.client.get(f"/quality/{name}.svg", headers={"Accept-Language": "zh"})
        assert answer.headers["content-type"] == "image/svg+xml"
        assert answer.text.rstrip().endswith("</svg>")
        assert "<path" in answer.text
        assert "style" not in answer.text
        assert "<text" in answer.text


def test_drift_is_measured_and_kept(tmp_path: Path) -> None:
    pages = Pages(tmp_path, log=tmp_path / "log.jsonl")
    assert pages.post("/quality/drift").status_code == 200
    words = ["drift", str(tmp_path / "old"), str(tmp_path / "log.jsonl"), "--text-column", "text"]
    assert pages.last_command("drift") == words
    job = pages.desk.jobs.last("drift")
    assert job
    pages.end(job.id, drifted((0.4, 0.3, 0.3)))
    assert "No need to retrain." in pages.get("/quality")
    result = drifted((0.1, 0.1, 0.8))
    pages.done("drift", result)
    page = pages.get("/quality")
    assert '<strong class="warn">Retrain.</strong>' in page
    assert "mix of the predicted categories" in page
    assert f"{result['measures']['label_mix']['value']:.3f}" in page
    assert page.count("No need to retrain.") == 1  # in the history


def test_without_a_log_drift_is_explained(pages: Pages) -> None:
    assert "Start the desk with --log" in pages.get("/quality")


def test_suspected_labels_come_from_clean_and_evaluate(pages: Pages) -> None:
    training = {
        "data": {"cleaning": {"dropped": {"conflicting labels": 4}, "examples": {"conflicting labels": [3, 9]}}}
    }
    (pages.folder / "old" / "training.json").write_text(json.dumps(training), "utf-8")
    assert "Training left out 4 rows" in pages.get("/quality")
    (pages.folder / "old" / "training.json").write_text("[]", "utf-8")  # damaged
    assert "Training left out" not in pages.get("/quality")

    rows = [(f"红富士苹果 {i}", "水果") for i in range(9)] + [(f"{EVIL} 苹果", "水果"), (f"{EVIL} 苹果", "零食")]
    table, out = pages.folder / "data.csv", pages.folder / "cleaned.jsonl"
    table.write_text("text,category\n" + "".join(f"{text},{label}\n" for text, label in rows), "utf-8")
    pages.post("/quality/doubtful")
    job = pages.desk.jobs.last("doubtful")
    assert job
    assert [words[0] for words in job.commands] == ["clean", "evaluate"]
    assert "--held-out" not in job.commands[1]
    pages.end(job.id, clean_file(table, out, "text", "category"), evaluated("old"))
    assert not list(pages.folder.glob("cleaned*"))
    page = pages.get("/quality")
    assert "1 groups of 2 rows" in page
    assert "Labels that the model contradicts" in page
    assert EVIL not in page


def version(repository: Path, number: int, **report: Any) -> None:
    """Write what the pages read of a version."""
    gate = {"least_agreement": 0.99, "largest_f1_loss": 0.01, "loosened": False}
    figures = {"target": "openvino", "precision": "int8", "agreement": 0.995, "f1_loss": 0.001, "gate": gate}
    for model in MODELS:
        (repository / model / str(number)).mkdir(parents=True)
    content = json.dumps({**figures, **report})
    (repository / "encoder" / str(number) / "report.json").write_text(content, "utf-8")
    (repository / MODELS[-1] / str(number) / MANIFEST).write_text("{}", "utf-8")


def test_versions_have_their_figures(pages: Pages) -> None:
    repository = pages.folder / "repository"
    assert "There is no built version" in pages.get("/quality")
    for number in (1, 2, 3):
        version(repository, number, agreement=1 - number / 1000)
    (repository / "encoder" / "3" / "report.json").write_text("damaged")
    Release(2, 1).save(repository)
    page = pages.get("/quality")
    assert "99.90%" in page
    assert "openvino int8" in page
    assert page.count(">live<") == page.count(">previous<") == 1
    assert "version 3 is damaged" in page
    assert "Version 2 is live." in pages.get("/models")
    assert "Roll back to version 1?" in pages.get("/models")


def test_retraining_takes_all_corrections_and_marks_exactly_these(pages: Pages) -> None:
    assert "Nothing is corrected yet" in pages.post("/models/retrain").text
    pages.agree(f"{EVIL} 苹果", CATEGORIES[1], CATEGORIES[0])
    pages.agree("数据线", CATEGORIES[2], CATEGORIES[2])
    page = pages.get("/models")
    assert "2 texts are new; 2 texts are labelled in all." in page
    assert EVIL not in page

    assert pages.post("/models/retrain").headers["HX-Redirect"] == "/models"
    job = pages.desk.jobs.last("retrain")
    assert job
    folder = pages.desk.options.folder
    file = folder / "jobs-data" / f"corrections-{job.id}.jsonl"
    (words,) = job.commands
    assert words[:3] == ["retrain", str(pages.folder / "old"), str(pages.folder / "data.csv")]
    assert words[3:8] == ["--corrections", str(file), "-o", str(folder / "checkpoints" / str(job.id)), "--overwrite"]
    assert [json.loads(line) for line in file.read_text("utf-8").splitlines()] == [
        {"text": f"{EVIL} 苹果", "correct_category": CATEGORIES[0]},
        {"text": "数据线", "correct_category": CATEGORIES[2]},
    ]
    assert pages.post("/models/retrain").status_code == 409
    assert pages.post("/models/rollback").status_code == 409

    # Meanwhile one text is added, and one gets another label.
    pages.agree("新的", CATEGORIES[0], CATEGORIES[1])
    with pages.desk.store.write() as db:
        db.execute("UPDATE items SET agreed = ? WHERE text = '数据线'", (CATEGORIES[1],))
    pages.end(job.id, retrained(folder / "checkpoints" / str(job.id)))
    assert pages.retrained() == {f"{EVIL} 苹果": job.id, "数据线": None, "新的": None}
    assert "2 texts are new; 3 texts are labelled in all." in pages.get("/models")


def test_old_and_new_are_side_by_side(pages: Pages) -> None:
    file = pages.folder / "corrections.jsonl"
    file.write_text("", "utf-8")
    result = retrained(pages.folder / "new")
    pages.done("retrain", result, file=str(file), corrections=2)
    page = pages.get("/models")
    for which in ("old", "new"):
        assert f"{result['held_out'][which]['accuracy']:.2%}" in page
    assert "4 texts that the two answer differently" in page
    assert "the new checkpoint gets 1 of 2 corrections right" in page
    assert "Categories that changed most" in page
    assert EVIL not in page
    assert "retrained with 2 corrections" in page


@pytest.fixture
def made(pages: Pages) -> Job:
    """A retraining whose checkpoint can be rolled out."""
    (pages.folder / "new").mkdir()
    (pages.folder / "corrections.jsonl").write_text("", "utf-8")
    return pages.done(
        "retrain", retrained(pages.folder / "new"), file=str(pages.folder / "corrections.jsonl"), corrections=2
    )


TRIAL = {"shadow": "60", "agreement": "90", "canary": "10", "canary_seconds": "30"}


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({}, ["--shadow", "60", "--agreement", "0.9", "--canary", "0.1", "--canary-seconds", "30"]),
        ({"shadow": "0"}, ["--canary", "0.1", "--canary-seconds", "30"]),
        ({"canary": "0"}, ["--shadow", "60", "--agreement", "0.9"]),
        ({"canary": "0.5", "shadow": ""}, ["--canary", "0.005", "--canary-seconds", "30"]),
        ({"shadow": "0", "canary": "0", "canary_seconds": "0"}, []),
    ],
)
def test_a_rollout_gives_only_options_that_fit(
    pages: Pages, made: Job, changed: dict[str, str], options: list[str]
) -> None:
    answer = pages.post("/models/deploy", retraining=str(made.id), **{**TRIAL, **changed})
    assert answer.headers["HX-Redirect"] == "/models"
    words = ["deploy", str(pages.folder / "new"), "--repository", str(pages.folder / "repository"), *options]
    assert pages.last_command("deploy") == words
    assert pages.post("/models/deploy", retraining=str(made.id), **TRIAL).status_code == 409


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"shadow": "-1"}, "Give 0 to 86400 seconds for the comparison."),
        ({"shadow": "1.5"}, "Give 0 to 86400 seconds for the comparison."),
        ({"agreement": "101"}, "Give 0 to 100 percent for the least agreement."),
        ({"canary": "nan"}, "Give 0 to 100 percent for the share of the canary."),
        ({"canary_seconds": "long"}, "Give 0 to 86400 seconds for the canary."),
        ({"canary_seconds": "1e9"}, "Give 0 to 86400 seconds for the canary."),
        ({"canary_seconds": "0"}, "Give the canary at least 1 second, or a share of 0."),
        ({"retraining": "99"}, "This retraining does not exist."),
        ({"retraining": "²"}, "This retraining does not exist."),
        ({"retraining": "-1"}, "This retraining does not exist."),
    ],
)
def test_wrong_numbers_are_refused(pages: Pages, made: Job, changed: dict[str, str], sentence: str) -> None:
    answer = pages.post("/models/deploy", **{"retraining": str(made.id), **TRIAL, **changed})
    assert answer.status_code in (404, 422)
    assert sentence in answer.text
    assert pages.desk.jobs.last("deploy") is None


def test_a_deleted_checkpoint_is_not_rolled_out(pages: Pages, made: Job) -> None:
    (pages.folder / "new").rmdir()
    assert "was deleted" in pages.post("/models/deploy", retraining=str(made.id)).text


def test_a_folder_that_was_moved_still_has_its_checkpoints(tmp_path: Path) -> None:
    """Also what waits, and what version each checkpoint became."""
    pages = Pages(tmp_path)
    made = tmp_path / "desk" / "checkpoints" / "1"
    made.mkdir(parents=True)
    corrections = tmp_path / "desk" / "corrections.jsonl"
    corrections.write_text("", "utf-8")
    pages.done("retrain", retrained(made), file=str(corrections), corrections=2)
    pages.done("deploy", rolled_out(2, 1, changed=True), checkpoint=str(made), retraining=1)
    pages.agree("数据线", CATEGORIES[2], CATEGORIES[2])
    pages.post("/models/retrain")

    (tmp_path / "moved").mkdir()
    (tmp_path / "desk").rename(tmp_path / "moved" / "工作台")
    for _ in range(2):  # and it is not moved at every start
        desk = Desk(replace(pages.desk.options, folder=tmp_path / "moved" / "工作台"))
    folder = desk.options.folder
    assert desk.checkpoint == folder / "checkpoints" / "1"
    job = desk.jobs.last("retrain")
    assert job
    assert job.commands[0][1] == str(folder / "checkpoints" / "1")
    assert job.commands[0][2] == str(pages.folder / "data.csv")
    assert Path(job.detail["file"]).is_file()
    desk.jobs.cancel(job.id, "li")
    answer = DeskClient(desk).act("/models/deploy", retraining="1", shadow="0", canary="0")
    assert answer.status_code == 200, answer.text


def rolled_out(number: int, previous: int, **more: Any) -> dict[str, Any]:
    gate = {"least_agreement": 0.99, "largest_f1_loss": 0.01, "state": "passed", "note": ""}
    return {"version": number, "previous": previous, "servers": 1, "gate": gate, **more}


def test_the_checkpoint_in_use_follows_rollouts_and_rollbacks(pages: Pages, made: Job) -> None:
    old, new = pages.folder / "old", pages.folder / "new"
    assert "Promote at once" in pages.get("/models")
    shadow = {"compared": 40, "agreement": 0.95, "asked": 0.9, "changes": {f"{EVIL} → b": 2}}
    canary = {"share": 0.1, "requests": 30, "failures": 0, "mean_ms": 2.5, "mean_ms_of_live": None}
    result = rolled_out(2, 1, changed=True, shadow=shadow, canary=canary)
    pages.done("deploy", result, checkpoint=str(new), retraining=made.id)
    assert pages.desk.checkpoint == new
    page = pages.get("/models")
    assert "Promote at once" not in page
    assert "Version 2 went live on 1 servers" in page
    assert "95.00%" in page
    assert EVIL not in page
    pages.agree("数据线", CATEGORIES[2], CATEGORIES[2])
    pages.post("/models/retrain")
    assert pages.last_command("retrain")[1] == str(new)
    job = pages.desk.jobs.last("retrain")
    assert job
    pages.desk.jobs.cancel(job.id, "li")

    for live, previous, checkpoint in ((1, 2, old), (2, 1, new), (1, 2, old)):
        pages.done("rollback", rolled_out(live, previous))
        assert pages.desk.checkpoint == checkpoint
    pages.done("rollback", rolled_out(7, 1))  # of a rollout that the desk did not make
    assert pages.desk.checkpoint == old


def test_a_rollout_that_changed_nothing_changes_no_checkpoint(pages: Pages, made: Job) -> None:
    pages.done("deploy", rolled_out(2, 1, changed=False), checkpoint=str(pages.folder / "new"), retraining=made.id)
    assert pages.desk.checkpoint == pages.folder / "old"


def test_a_trial_is_shown_while_it_runs_and_when_it_was_cut_off(pages: Pages, made: Job) -> None:
    repository = pages.folder / "repository"
    for number in (1, 2):
        version(repository, number)
    pages.post("/models/deploy", retraining=str(made.id), **TRIAL)
    job = pages.desk.jobs.last("deploy")
    assert job
    with pages.desk.store.write() as db:
        db.execute("UPDATE jobs SET state = 'running' WHERE id = ?", (job.id,))
    for release, traffic, told in (
        (Release(1), {}, "Rollout"),
        (Release(1, candidate=2), {}, "Version 2 is being loaded. Version 1 answers all requests."),
        (Release(1, candidate=2, shadow=True), {}, "Agreement of both versions: –."),
        (Release(1, candidate=2, shadow=True), {"shadow_compared": 9, "shadow_agreed": 6}, "both versions: 66.67%."),
        (Release(1, candidate=2, share=0.1), {"candidate_requests": 7}, "Requests that the canary answered: 7."),
    ):
        revision = release.save(repository).revision
        Status("0.0.0.0:1", revision, traffic=traffic).write(repository)
        for page in ("/models", f"/jobs/{job.id}"):
            assert told in pages.get(page)
    with pages.desk.store.write() as db:
        db.execute("UPDATE jobs SET state = 'failed', error = 'it was killed' WHERE id = ?", (job.id,))
    assert "Version 2 is still on trial, because the rollout was cut off." in pages.get("/models")
    Release(1).save(repository)
    assert "The new version is not live. Version 1 answers all requests." in pages.get("/models")


def test_rollback_is_a_job(pages: Pages) -> None:
    assert pages.post("/models/rollback").headers["HX-Redirect"] == "/models"
    assert pages.last_command("rollback") == ["rollback", "--repository", str(pages.folder / "repository")]
    assert pages.post("/models/rollback").status_code == 409


def test_events_are_told_in_words(pages: Pages) -> None:
    with pages.desk.store.write() as db:
        note(db, "小李", "upload", file=f"{EVIL}.csv", bytes=3)
        note(db, "小李", "strange", number=7)
        note(db, "小李", "retrain")  # of an earlier desk, without the number
        note(db, "小李", "login")
        note(db, "小李", "delete", file="{person}")
    page = pages.get("/models")
    for sentence in ("strange (number: 7)", "logged in", "deleted {person}", "uploaded &lt;script&gt;"):
        assert sentence in page
    assert EVIL not in page


def test_every_sentence_is_translated() -> None:
    """What the templates and routes say stands in the translations."""
    folder = Path(models.__file__).parent.parent
    names = ("_quality_*", "_models_*", "quality*", "models*")
    sources = [each.read_text("utf-8") for name in names for each in (folder / "templates").glob(name)]
    said = {text for source in sources for text in re.findall(r'_\("([^"]+)"', source)}
    for name in ("quality", "models"):
        said |= set(re.findall(r'Problem\(\s*"([^"]+)"', (folder / "pages" / f"{name}.py").read_text("utf-8")))
    said |= set(re.findall(r'translate\("([^"]+)"', (folder / "charts.py").read_text("utf-8")))
    said |= {*TITLES.values(), *models.EVENTS.values(), *(sentence for _, sentence in models.FIELDS.values())}
    said |= {title for title, _ in quality.SORTS.values()}
    said |= {text for rule in RULES.values() for text in (rule.title, rule.unit)}
    found = translations("zh")
    assert said <= found.keys()
    for text in said:
        assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", found[text])), text


def test_random_events_never_break_the_page(pages: Pages, rng: random.Random) -> None:
    with pages.desk.store.write() as db:
        for what in models.EVENTS:
            names = rng.sample(["file", "job", "corrections", "retraining", "self", "text"], rng.randint(0, 5))
            note(db, "x", what, **dict.fromkeys(names, "{"))
    pages.get("/models")
