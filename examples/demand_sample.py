"""Write SYNTHETIC daily counts of categories, to try `aisle demand`.

python examples/demand_sample.py sales.csv
aisle demand sales.csv --date-column date --count-column count -o forecast.csv --report demand.html

Each category has a level, a trend, a weekly season, festivals of another strength each year, and negative binomial
noise. One category breaks out: its demand is 2.5 times as high in the last five days.
"""

from __future__ import annotations

import csv
import datetime
import sys
from collections.abc import Iterator

import numpy as np

CATEGORIES = {
    "宠物": ("猫砂", "猫粮", "狗粮", "牵引绳", "宠物玩具"),
    "食品": ("水果", "零食", "坚果礼盒", "茶叶", "粮油", "乳品"),
    "数码": ("手机", "耳机", "数据线", "充电宝", "手机壳"),
    "家居": ("四件套", "收纳", "台灯", "毛巾"),
}
BREAK_OUT, FACTOR, SINCE = "宠物 > 猫砂", 2.5, 5  # the category, how much more it sells, for how many days
NEW_YEARS = ("2021-02-12", "2022-02-01", "2023-01-22", "2024-02-10", "2025-01-29", "2026-02-17", "2027-02-06")
DISPERSION = 30.0  # of the negative binomial noise; the variance is mean + mean²/30


def series(days: int, last: datetime.date, seed: int) -> Iterator[tuple[str, list[int]]]:
    """Yield each category with its daily counts."""
    rng = np.random.default_rng(seed)
    dates = [last - datetime.timedelta(days=days - 1 - number) for number in range(days)]
    for department, leaves in CATEGORIES.items():
        for leaf in leaves:
            level = np.exp(rng.normal(3.2, 1.0))
            week = np.exp(rng.normal(0, 0.2, 7))
            trend = np.exp(rng.normal(0, 0.25) * np.arange(days) / 365)
            strength = rng.normal(1.0, 0.25) + rng.normal(0, 0.2, last.year - dates[0].year + 1)  # another each year
            lifts = [lift(day) ** strength[day.year - dates[0].year] for day in dates]
            mean = level * trend * np.array([week[day.weekday()] for day in dates]) * lifts
            if f"{department} > {leaf}" == BREAK_OUT:
                mean[-SINCE:] *= FACTOR
            yield f"{department} > {leaf}", rng.poisson(rng.gamma(DISPERSION, mean / DISPERSION)).tolist()


def lift(day: datetime.date) -> float:
    """Return what the festivals multiply the demand of a day by."""
    for text in NEW_YEARS:
        away = (day - datetime.date.fromisoformat(text)).days
        if -18 <= away <= -5:
            return 1.6
        if -4 <= away <= 6:
            return 0.4
    peaks = {(11, 11): 4.0, (11, 10): 1.5, (11, 1): 2.0, (6, 18): 3.0, (6, 1): 1.6, (12, 12): 1.8}
    return peaks.get((day.month, day.day), 1.2 if day.month == 10 and day.day < 8 else 1.0)


def write(path: str, days: int = 1100, last: datetime.date = datetime.date(2026, 10, 31), seed: int = 0) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", "category", "count"])
        for category, counts in series(days, last, seed):
            for number, count in enumerate(counts):
                if count:  # a day without sales has no row
                    writer.writerow([last - datetime.timedelta(days=days - 1 - number), category, count])


if __name__ == "__main__":
    write(sys.argv[1] if len(sys.argv) > 1 else "sales.csv")
