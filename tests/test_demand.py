"""Demand: daily counts, forecasts that add up, festivals and break-outs, on SYNTHETIC series."""

from __future__ import annotations

import csv
import datetime
import json
import runpy
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aisle.client import Prediction, TrafficLog
from aisle.errors import InputError
from aisle.preprocess.tables.table import read_rows
from aisle.train.demand.counts import Columns, read_counts
from aisle.train.demand.demand import COLUMNS, needed
from aisle.train.demand.festivals import FESTIVALS, Calendar, effect_of
from aisle.train.demand.hierarchy import ALL, OWN, tree_of
from aisle.train.demand.models import MEAN, NAIVE, choose, forecast, origins

from .conftest import aisle

FIRST = datetime.date(2026, 3, 1)
DAYS = 120
ROWS = Sequence[tuple[object, str, float]]


def sales(days: int = DAYS, seed: int = 0) -> list[tuple[object, str, float]]:
    """Counts of four categories with a weekly season; one of them triples in the last five days, one is rare."""
    rng = np.random.default_rng(seed)
    week = np.array([1.0, 0.9, 0.9, 1.0, 1.2, 1.6, 1.5])
    means = {"宠物 > 猫砂": 40.0, "宠物 > 狗粮": 60.0, "食品 > 茶叶": 25.0, "食品": 30.0, "数码 > 耳机": 0.05}
    rows: list[tuple[object, str, float]] = []
    for category, mean in means.items():
        rate = mean * week[np.arange(days) % 7]
        if category == "宠物 > 猫砂":
            rate[-5:] *= 3
        counts = rng.poisson(rate)
        counts[0] = max(1, counts[0])
        rows += [(FIRST + datetime.timedelta(days=day), category, int(n)) for day, n in enumerate(counts.tolist()) if n]
    return rows


def write(path: Path, rows: Iterable[tuple[object, ...]], header: str = "date,category,count") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(header + "\n")
        csv.writer(file).writerows(rows)
    return path


class Run:
    """A run of the command on the synthetic sales, for the tests that only read what it wrote."""

    def __init__(self, folder: Path) -> None:
        self.out, self.page = folder / "forecast.csv", folder / "demand.html"
        table = write(folder / "sales.csv", sales())
        done = aisle("demand", table, *COUNTED, "-o", self.out, "--horizon", "14", "--report", self.page, "--json")
        assert done.returncode == 0, done.stderr
        self.messages = done.stderr
        self.result: dict[str, Any] = json.loads(done.stdout)
        self.rows = list(read_rows(self.out))


COUNTED = ("--date-column", "date", "--count-column", "count")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("demand"))


def test_forecasts_of_every_level_are_a_table(done: Run) -> None:
    assert list(done.rows[0]) == COLUMNS
    names = list(dict.fromkeys((row["category"], int(row["level"])) for row in done.rows))
    assert names[0] == (ALL, 0)
    assert ("宠物", 1) in names
    assert (f"食品 > {OWN}", 2) in names
    assert len(done.rows) == 14 * len(names) == 14 * done.result["series"]
    dates = [row["date"] for row in done.rows[:14]]
    assert dates[0] == str(FIRST + datetime.timedelta(days=DAYS))
    assert dates == sorted(dates)
    for row in done.rows:
        ordered = [float(row[name]) for name in ("low_95", "low_80", "forecast", "high_80", "high_95")]
        assert ordered == sorted(ordered)
        assert ordered[0] >= 0


def test_children_add_up_to_their_parents(done: Run) -> None:
    by_day: dict[str, dict[str, float]] = defaultdict(dict)
    for row in done.rows:
        by_day[row["date"]][row["category"]] = float(row["forecast"])
    for told in by_day.values():
        assert told[ALL] == pytest.approx(told["宠物"] + told["食品"] + told["数码"], abs=0.01)
        assert told["宠物"] == pytest.approx(told["宠物 > 猫砂"] + told["宠物 > 狗粮"], abs=0.01)
        assert told["食品"] == pytest.approx(told["食品 > 茶叶"] + told[f"食品 > {OWN}"], abs=0.01)


def test_the_planted_break_out_is_found(done: Run) -> None:
    leaves = [each for each in done.result["break_outs"] if each["level"] == 2]
    assert [(each["category"], each["side"]) for each in leaves] == [("宠物 > 猫砂", "above")]
    assert leaves[0]["since"] == str(FIRST + datetime.timedelta(days=DAYS - 5))
    assert leaves[0]["days_outside"] == 5
    assert leaves[0]["actual"] > 2 * leaves[0]["forecast"]


def test_a_rare_category_gets_its_mean_and_the_output_says_so(done: Run) -> None:
    simple = {each["category"]: each for each in done.result["not_validated"]}
    assert simple["数码 > 耳机"]["model"] == MEAN
    assert "sparse" in simple["数码 > 耳机"]["reason"]
    assert "a simple forecast that is not validated" in done.messages
    assert {row["model"] for row in done.rows if row["category"] == "数码 > 耳机"} == {MEAN}


def test_the_accuracy_is_measured_beside_the_seasonal_naive(done: Run) -> None:
    assert [each["level"] for each in done.result["accuracy"]] == [0, 1, 2]
    for each in done.result["accuracy"]:
        assert each["mase"] > 0
        assert each["mase_seasonal_naive"] > 0
        assert each["inside_80"] <= each["inside_95"]
    page = done.page.read_text("utf-8")
    assert page.count("<svg") == 2
    assert "宠物 &gt; 猫砂" in page
    assert json.loads(done.page.with_suffix(".json").read_text("utf-8")) == done.result


def test_days_without_rows_count_as_zero(tmp_path: Path) -> None:
    rows = [("2026/1/5", "茶叶", 2), ("2026年1月8日", "茶叶", 3), ("20260105", "茶叶", 1), ("2026-01-07", "", 9)]
    counts = read_counts(write(tmp_path / "t.csv", rows), Columns("date", count="count"))
    assert counts.by_category["茶叶"].tolist() == [3, 0, 0, 3]
    assert (counts.first, counts.days, counts.rows) == (datetime.date(2026, 1, 5), 4, 3)
    assert counts.skipped == {"label missing": 1}
    assert counts.longest_gap() == (datetime.date(2026, 1, 6), 2)
    once = read_counts(tmp_path / "t.csv", Columns("date"))
    assert once.by_category["茶叶"].tolist() == [2, 0, 0, 1]


def test_days_of_parquet_and_of_a_time_zone(tmp_path: Path) -> None:
    from zoneinfo import ZoneInfo

    import pyarrow as pa
    import pyarrow.parquet as pq

    times = [datetime.datetime(2026, 1, day, 20, tzinfo=datetime.UTC) for day in (1, 2)]
    pq.write_table(pa.table({"time": times, "category": ["茶叶", "茶叶"]}), tmp_path / "t.parquet")
    assert read_counts(tmp_path / "t.parquet", Columns()).first == datetime.date(2026, 1, 1)
    shanghai = read_counts(tmp_path / "t.parquet", Columns(zone=ZoneInfo("Asia/Shanghai")))
    assert shanghai.first == datetime.date(2026, 1, 2)
    assert shanghai.ends_early == "04:00"
    assert not shanghai.unzoned
    write(tmp_path / "plain.csv", [("2026-01-01T23:30", "茶叶", 1), ("2026-01-02", "茶叶", 1)])
    assert read_counts(tmp_path / "plain.csv", Columns("date", zone=ZoneInfo("Asia/Shanghai"))).unzoned
    assert read_counts(tmp_path / "t.parquet", Columns(until=datetime.date(2026, 1, 2))).ends_early == ""


def test_counts_of_0_are_not_the_wrong_columns(tmp_path: Path) -> None:
    write(tmp_path / "t.csv", [("2026-01-01", "茶叶", 0), ("2026-01-02", "茶叶", 0)])
    with pytest.raises(InputError, match="the count of every row is 0"):
        read_counts(tmp_path / "t.csv", Columns("date", count="count"))


def test_a_traffic_log_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with TrafficLog(path) as log:
        log.record(["龙井"] * 1000, [Prediction(("茶叶",), (0.9,))] * 1000)
    lines = path.read_text("utf-8").splitlines()
    assert "words" in lines[-1]
    older = json.loads(lines[0]) | {"time": "2026-01-01T00:00:00Z"}
    path.write_text("\n".join([json.dumps(older), *lines]) + "\n")
    counts = read_counts(path, Columns())
    assert counts.rows == 1001
    assert counts.by_category["茶叶"][-1] == 1000


@pytest.mark.parametrize(
    ("rows", "options", "complaint"),
    [
        ([("2026-01-01", "a", 1)] * 3, (), "all rows are of one day, 2026-01-01"),
        ([("2026-01-01", "a", 1), ("2026-01-09", "a", 1)], (), "9 days"),
        ([("11/12/2026", "a", 1)], (), "row 1: date '11/12/2026' is not a date; write it as 2026-11-24"),
        ([("", "a", 1)], (), "row 1: date is missing"),
        ([("2026-01-01", "", 1)], (), "nothing to count (label missing: 1)"),
        ([("2026-01-01", "a", 0), ("2026-01-30", "a", 0)], (), "nothing to count"),
        ([("2026-01-01", "a", -2)], (), "row 1: count '-2' is not a number of 0 or more"),
        ([("2026-01-01", "a", "two")], (), "row 1: count 'two'"),
        ([("2026-01-01T08:00Z", "a", 1), ("2026-01-02T08:00+08:00", "a", 1)], (), "give --time-zone"),
        ([("2026-01-01T08:00Z", "a", 1), ("2026-01-02T08:00", "a", 1)], (), "write all of them with a zone"),
        ([("0026-01-01", "a", 1), ("2026-01-02", "a", 1)], (), "correct the date"),
        ([("2026-01-01", "a", 1)], ("--date-column", "when"), "no column 'when'; it has: date, category, count"),
        ([("2026-01-01", "a", 1)], ("--label-column", "kind"), "no column 'kind'"),
        ([("2026-01-01", "a", 1)], ("--count-column", "sold"), "no column 'sold'"),
        ([("2026-01-01", "a", 1)], ("--until", "today"), "--until today: write the date as 2026-11-24"),
        ([("2026-01-01", "a", 1)], ("--time-zone", "Beijing"), "--time-zone Beijing: there is no such zone"),
        ([], (), "nothing to count"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, rows: ROWS, options: tuple[str, ...], complaint: str
) -> None:
    table = write(tmp_path / "sales.csv", rows)
    done = aisle("demand", table, *COUNTED, *options, "-o", tmp_path / "f.csv", "--report", tmp_path / "f.html")
    lines = [line for line in done.stderr.splitlines() if line.startswith("aisle: ")]
    assert (done.returncode, len(lines)) == (2, 1), done.stderr
    assert complaint in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["sales.csv"]


def test_an_unknown_format_is_refused_before_the_work(tmp_path: Path) -> None:
    table = write(tmp_path / "sales.csv", sales(20))
    for out, complaint in ((tmp_path / "f.dat", "unknown file format"), (table, "is the input")):
        done = aisle("demand", table, *COUNTED, "-o", out)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert complaint in done.stderr


def test_a_short_table_gets_the_seasonal_naive(tmp_path: Path) -> None:
    table = write(tmp_path / "sales.csv", [*sales(20), (FIRST, "食品|数码", 1)])
    done = aisle("demand", table, *COUNTED, "-o", tmp_path / "f.csv")
    assert done.returncode == 0, done.stderr
    assert "'食品|数码', are counted as one each" in done.stderr
    assert "too short to measure" in done.stderr
    assert "too short to look for break-outs" in done.stderr
    assert {row["model"] for row in read_rows(tmp_path / "f.csv")} <= {NAIVE, MEAN}


def test_a_forecast_closer_to_certain_series_is_reconciled() -> None:
    tree, values = tree_of({"a > b": np.ones(3), "a > c": np.full(3, 2.0)})
    assert tree.names == (ALL, "a", "a > b", "a > c")
    assert values[0].tolist() == [3, 3, 3]
    told = tree.reconcile(np.array([[9.0], [9.0], [1.0], [2.0]]), np.array([1.0, 1.0, 1e-6, 10.0]))
    assert told[:, 0] == pytest.approx([9, 9, 1, 8], abs=0.5)
    nothing = tree.reconcile(np.array([[0.0], [0.0], [1.0], [-5.0]]), np.ones(4))
    assert (nothing >= 0).all()


def test_a_category_that_is_called_other_joins_the_rows_of_its_parent() -> None:
    tree, values = tree_of({"a": np.ones(2), f"a > {OWN}": np.full(2, 4.0), "a > b": np.full(2, 2.0)})
    assert dict(zip(tree.names, values[:, 0].tolist(), strict=True)) == {ALL: 7, "a": 7, f"a > {OWN}": 5, "a > b": 2}
    assert np.isfinite(tree.reconcile(values, np.ones(4))).all()


def festive(years: int, seed: int = 0) -> tuple[Calendar, np.ndarray[Any, np.dtype[np.float64]]]:
    """Counts with five times the demand on each 11 November, and the half in the week of the Chinese New Year."""
    first = datetime.date(2026 - years, 8, 1)
    days = (datetime.date(2026, 11, 30) - first).days
    calendar = Calendar(first, days)
    dates = [first + datetime.timedelta(days=day) for day in range(days)]
    spring = {day for year in range(2020, 2028) for day in FESTIVALS[0].days(year)[21:28]}
    means = [50.0 * (5 if (day.month, day.day) == (11, 11) else 0.5 if day in spring else 1) for day in dates]
    return calendar, np.random.default_rng(seed).poisson(means).astype(np.float64)


def test_a_festival_improves_the_forecast() -> None:
    """The third 11 November is forecast from the two before it."""
    calendar, counts = festive(2)
    end = calendar.days - 30  # 31 October 2026
    factors, errors, tests = effect_of(calendar, counts, 0, end)
    assert tests["双11"].used
    assert tests["双11"].error_with < 0.5 * tests["双11"].error_without
    assert tests["春节"].used
    assert not tests["618"].used
    assert (errors[[0, calendar.days - 20]] > 0).tolist() == [False, True]
    plain = forecast(NAIVE, counts[:end], 28).mean
    lifted = forecast(NAIVE, counts[:end] / factors[:end], 28).mean * factors[end : end + 28]
    actual = counts[end : end + 28]
    assert np.abs(lifted - actual).mean() < 0.7 * np.abs(plain - actual).mean()


def test_a_festival_that_was_seen_once_is_not_used() -> None:
    calendar, counts = festive(1)
    factors, _, tests = effect_of(calendar, counts, 0, calendar.days - 30)
    assert tests["双11"].windows == 0
    assert (factors == 1).all()


def test_the_chinese_new_year_moves() -> None:
    spring = FESTIVALS[0]
    assert [spring.days(year)[spring.before] for year in (2024, 2026)] == [
        datetime.date(2024, 2, 10),
        datetime.date(2026, 2, 17),
    ]


def test_models_are_chosen_by_validation() -> None:
    """A level that moves up is forecast better by the models than by the week before; each origin has enough days."""
    assert origins(112, 28) == [84, 70, 56]
    assert origins(50, 28) == []
    week = np.tile([10.0, 8, 8, 9, 12, 20, 18], 20)
    counts = week * np.linspace(1, 4, 140) + np.random.default_rng(0).normal(0, 3, 140)
    chosen = choose(counts, np.ones(200), 28)
    assert chosen.model != NAIVE
    assert chosen.errors[chosen.model] < 0.9 * chosen.errors[NAIVE]
    assert chosen.why == ""


def test_a_break_out_needs_more_days_if_there_are_more_series() -> None:
    assert needed(7, 5) == 3
    assert needed(7, 1000) == 4
    assert needed(3, 10**6) == 3


def test_the_example_writes_synthetic_sales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["demand_sample.py", str(tmp_path / "sales.csv")])
    runpy.run_path(str(Path(__file__).parent.parent / "examples" / "demand_sample.py"), run_name="__main__")
    counts = read_counts(tmp_path / "sales.csv", Columns("date", count="count"))
    assert (counts.days, len(counts.by_category)) == (1100, 20)
    assert json.dumps(counts.skipped) == "{}"


def test_columns_are_checked_in_python_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column 'time'"):
        read_counts(write(tmp_path / "sales.csv", sales(20)), Columns())
