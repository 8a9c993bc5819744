"""The data contract of a table: what each later table of its kind must hold, in a TOML file that people edit.

`propose` makes one from a table, and `check` compares a table with it. Both read the table once.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from aisle.errors import InputError
from aisle.files import write_text
from aisle.preprocess.tables.table import as_text, read_rows, refuse_faulty

MISSING_FACTOR, MISSING_LEAST = 2.0, 0.01  # a proposal allows twice the share of missing values, and 1 % at least
ROWS_FACTOR = 0.5  # and half of the rows
APART = 0.2  # and shares of categories that differ by so much in all
DAYS_FACTOR, DAYS_LEAST = 2, 7  # and twice the age of the newest row, and a week at least
AHEAD = datetime.timedelta(days=1)  # a date may be so far ahead of now, because it may be of another time zone
MOST_CATEGORIES = 5000  # a column with more different values is not proposed as that of the categories


@dataclass(frozen=True)
class ColumnRule:
    """What a column must hold."""

    type: str = "text"  # one of `TYPES`
    missing_at_most: float = 0.0  # share of the rows


@dataclass(frozen=True)
class CategoryRule:
    """What the labels must be."""

    column: str
    shares: Mapping[str, float]  # the categories that are allowed, with the expected share of the rows
    others_at_most: float = 0.0  # share of the rows with another category
    apart_at_most: float = 1.0  # half of the sum of all differences from the shares (the total variation distance)


@dataclass(frozen=True)
class FreshnessRule:
    """How old the newest row may be."""

    column: str
    days: float


@dataclass(frozen=True)
class Contract:
    rows_at_least: int = 1
    columns: Mapping[str, ColumnRule] = field(default_factory=dict)
    categories: CategoryRule | None = None
    freshness: FreshnessRule | None = None


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def date_of(value: Any) -> datetime.datetime | None:
    """Return a date or time, in UTC if it has a time zone; None if the value is neither. Text is read as ISO 8601."""
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day)
    if isinstance(value, str) and not value.strip().isdigit():
        try:
            value = datetime.datetime.fromisoformat(value.strip())
        except ValueError:
            return None
    if not isinstance(value, datetime.datetime):
        return None
    try:
        return value.astimezone(datetime.UTC) if value.tzinfo else value.replace(tzinfo=datetime.UTC)
    except OverflowError:  # in the year 1 or 9999
        return None


# From the narrowest to the widest.
TYPES: dict[str, Callable[[Any], bool]] = {
    "date": lambda value: date_of(value) is not None,
    "number": _is_number,
    "list": lambda value: isinstance(value, list | tuple),
    "text": lambda value: isinstance(as_text(value), str),
    "any": lambda value: True,
}


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or as_text(value) is None


def categories_of(value: Any) -> list[str]:
    """Return the categories in a cell: one, or those of a list."""
    return [str(as_text(each)).strip() for each in (value if isinstance(value, list | tuple) else [value])]


class _Column:
    """The values of one column."""

    def __init__(self) -> None:
        self.filled = 0
        self.types = set(TYPES)  # those that all values have
        self.newest: datetime.datetime | None = None
        self.counts: Counter[str] | None = Counter()  # None if there are too many different values

    def add(self, value: Any) -> None:
        self.filled += 1
        self.types = {name for name in self.types if TYPES[name](value)}
        if "date" in self.types and (when := date_of(value)):
            self.newest = max(self.newest or when, when)
        if self.counts is not None:
            self.counts.update(categories_of(value))
            if len(self.counts) > MOST_CATEGORIES:
                self.counts = None


def propose(path: Path, label_column: str, today: datetime.datetime) -> Contract:
    """Return a contract that a table keeps.

    Args:
        label_column: the column of the categories.
        today: with which the newest date is compared.

    Raises:
        InputError: the table cannot be read, has no row, or lacks the label's column.
    """
    rows, columns = 0, dict[str, _Column]()
    for row in refuse_faulty(read_rows(path), path):
        rows += 1
        for name, value in row.items():
            columns.setdefault(name, _Column())
            if not is_missing(value):
                columns[name].add(value)
    if label_column not in columns:
        has = f"it has: {', '.join(columns)}" if columns else "it has no row"
        raise InputError(f"{path}: no column {label_column!r}; {has}; give the right one with --label-column")
    rules = {name: ColumnRule(_type(each), _missing(1 - each.filled / rows)) for name, each in columns.items()}
    dates = {name: each.newest for name, each in columns.items() if each.newest and "date" in each.types}
    newest = max(dates, key=lambda name: dates[name], default=None)
    freshness = FreshnessRule(newest, _days(today - dates[newest])) if newest else None
    counts = columns[label_column].counts
    categories = CategoryRule(label_column, _shares(counts), 0.0, APART) if counts else None
    return Contract(max(1, int(rows * ROWS_FACTOR)), rules, categories, freshness)


def _type(column: _Column) -> str:
    return next(name for name in TYPES if name in column.types) if column.filled else "any"


def _missing(share: float) -> float:
    return min(1.0, math.ceil(max(MISSING_LEAST, MISSING_FACTOR * share) * 100) / 100)


def _days(age: datetime.timedelta) -> float:
    return max(DAYS_LEAST, math.ceil(DAYS_FACTOR * age.total_seconds() / 86400))


def _shares(counts: Counter[str]) -> dict[str, float]:
    return {name: round(count / counts.total(), 6) for name, count in counts.most_common()}


def write_contract(contract: Contract, path: Path, made_from: str) -> None:
    """Write a contract as TOML, with comments that say what each limit means."""
    lines = [
        f"# What a table like {made_from} must hold. Edit it; `--contract` checks a table before a command reads it.",
        f"rows_at_least = {contract.rows_at_least}",
    ]
    for name, rule in contract.columns.items():
        lines += ["", f"[columns.{_key(name)}]", f"type = {_quoted(rule.type)} # {', '.join(TYPES)}"]
        lines += [f"missing_at_most = {rule.missing_at_most} # share of the rows"]
    if fresh := contract.freshness:
        lines += ["", "[freshness] # of the newest row", f"column = {_quoted(fresh.column)}", f"days = {fresh.days}"]
    if contract.categories:
        lines += _category_lines(contract.categories)
    write_text(path, "\n".join(lines) + "\n")


def _category_lines(rule: CategoryRule) -> list[str]:
    return [
        "",
        "[categories]",
        f"column = {_quoted(rule.column)}",
        f"others_at_most = {rule.others_at_most} # share of the rows with a category that is not listed here",
        f"apart_at_most = {rule.apart_at_most} # half of the sum of the differences from these shares",
        "",
        "[categories.shares]",
        *(f"{_key(name)} = {share}" for name, share in rule.shares.items()),
    ]


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else _quoted(name)


def _quoted(text: str) -> str:
    """Return a text as a TOML string, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_contract(path: Path) -> Contract:
    """Read a contract.

    Raises:
        InputError: it is not TOML, or an entry is unknown or of the wrong type; the message names it.
    """
    try:
        found = tomllib.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a contract: {error}") from None
    if not found:
        raise InputError(f"{path} is empty, so it checks nothing; aisle clean --propose-contract writes an example")
    try:
        columns = {name: _made(ColumnRule, each, f"columns.{name}") for name, each in found.pop("columns", {}).items()}
        parts: dict[str, Any] = {"columns": columns}
        for name, kind in (("categories", CategoryRule), ("freshness", FreshnessRule)):
            if name in found:
                parts[name] = _made(kind, found.pop(name), name)
        contract: Contract = _made(Contract, {**found, **parts}, "")
    except (TypeError, AttributeError, InputError) as error:
        raise InputError(f"{path}: {error}; aisle clean --propose-contract writes one as an example") from None
    shares = contract.categories.shares if contract.categories else {}
    if not isinstance(shares, dict) or not all(_is_share(each) for each in shares.values()):
        raise InputError(f"{path}: categories.shares must give each category's share of the rows, from 0 to 1")
    for name, rule in contract.columns.items():
        if rule.type not in TYPES:
            raise InputError(f"{path}: columns.{name}: there is no type {rule.type!r}; choose from {', '.join(TYPES)}")
    return contract


def _made(kind: type[Any], entries: Any, place: str) -> Any:
    """Return a rule of its entries.

    Raises:
        InputError: an entry is unknown, missing or of another type than its default or its name says.
    """
    if not isinstance(entries, dict):
        raise InputError(f"[{place}] is not a table")
    prefix = f"{place}." if place else ""
    known = {each.name: each for each in fields(kind)}
    if unknown := sorted(set(entries) - set(known)):
        raise InputError(f"there is no entry {prefix}{unknown[0]}; known are {', '.join(known)}")
    for name, value in entries.items():
        annotation = str(known[name].type)
        wanted: Any = (int, float) if annotation == "float" else {"int": int, "str": str}.get(annotation, object)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not object):
            kinds = {str: "a text", int: "a whole number"}
            raise InputError(f"{prefix}{name} is {value!r}; give {kinds.get(wanted, 'a number')}")
        if name.endswith("_at_most") and not _is_share(value):
            raise InputError(f"{prefix}{name} is {value!r}; give a share from 0 to 1, such as 0.05 for 5 %")
        if name in ("rows_at_least", "days") and not 0 <= value < math.inf:
            raise InputError(f"{prefix}{name} is {value!r}; give a number of 0 or more")
    try:
        return kind(**entries)
    except TypeError:
        lacking = next(name for name in known if name not in entries)
        raise InputError(f"{prefix}{lacking} is missing") from None


class _Check:
    """What one pass over a table finds."""

    def __init__(self, contract: Contract, today: datetime.datetime) -> None:
        self.contract, self.today = contract, today
        self.rows = 0
        self.filled: Counter[str] = Counter()
        self.seen: set[str] = set()
        self.wrong: Counter[str] = Counter()  # values of another type, by column
        self.first: dict[str, tuple[int, Any]] = {}  # the first of them
        self.categories: Counter[str] = Counter()
        self.unlisted: tuple[int, str] | None = None
        self.newest: datetime.datetime | None = None  # of the dates that are not in the future
        self.future: tuple[int, datetime.datetime] | None = None  # the first row with a date in the future

    def add(self, number: int, row: Mapping[str, Any]) -> None:
        self.rows += 1
        self.seen.update(row)
        for name, rule in self.contract.columns.items():
            value = row.get(name)
            if is_missing(value):
                continue
            self.filled[name] += 1
            if not TYPES[rule.type](value):
                self.wrong[name] += 1
                self.first.setdefault(name, (number, value))
        self._add_category(number, row)
        if (fresh := self.contract.freshness) and (when := date_of(row.get(fresh.column))):
            if when > self.today + AHEAD:
                self.future = self.future or (number, when)
            else:
                self.newest = max(self.newest or when, when)

    def _add_category(self, number: int, row: Mapping[str, Any]) -> None:
        rule = self.contract.categories
        if rule is None or is_missing(row.get(rule.column)):
            return
        for name in categories_of(row[rule.column]):
            self.categories[name] += 1
            if name not in rule.shares and self.unlisted is None:
                self.unlisted = number, name

    def faults(self) -> Iterator[str]:
        least = self.contract.rows_at_least
        if self.rows < least:
            yield f"{self.rows} rows, fewer than {least}"
        for name, rule in self.contract.columns.items():
            yield from self._faults_of(name, rule)
        if self.contract.categories:
            yield from self._category_faults(self.contract.categories)
        if fresh := self.contract.freshness:
            yield from self._freshness_faults(fresh)

    def _faults_of(self, name: str, rule: ColumnRule) -> Iterator[str]:
        if name not in self.seen:
            if rule.missing_at_most < 1:
                yield f"no column {name!r}"
            return
        missing = 1 - self.filled[name] / self.rows
        if missing > rule.missing_at_most:
            yield f"column {name!r}: {missing:.2%} of the values are missing, more than {rule.missing_at_most:.2%}"
        if wrong := self.wrong[name]:
            number, value = self.first[name]
            yield f"column {name!r}: {wrong} values are no {rule.type}, such as {_short(value)} in row {number}"

    def _category_faults(self, rule: CategoryRule) -> Iterator[str]:
        total = self.categories.total()
        if not total:
            if rule.column not in self.seen:
                yield f"no column {rule.column!r} with categories"
            return
        others = sum(count for name, count in self.categories.items() if name not in rule.shares)
        if self.unlisted and others / total > rule.others_at_most:
            number, name = self.unlisted
            yield f"{others} rows have a category that is not listed, such as {_short(name)} in row {number}"
        expected = Counter({name: share * total for name, share in rule.shares.items()})
        differences = {name: self.categories[name] - expected[name] for name in {*self.categories, *expected}}
        apart = sum(map(abs, differences.values())) / 2 / total
        if apart > rule.apart_at_most:
            most = max(differences, key=lambda name: differences[name])
            found, wanted = self.categories[most] / total, expected[most] / total
            yield (
                f"the shares of the categories are {apart:.2f} apart, more than {rule.apart_at_most}; "
                f"{_short(most)} has {found:.1%} of the rows instead of {wanted:.1%}"
            )

    def _freshness_faults(self, fresh: FreshnessRule) -> Iterator[str]:
        if self.future:
            number, when = self.future
            yield f"column {fresh.column!r}: the date {when:%Y-%m-%d} in row {number} is in the future"
        if self.newest is None:
            yield f"column {fresh.column!r} has no date" if fresh.column in self.seen else f"no column {fresh.column!r}"
        elif self.today - self.newest > datetime.timedelta(days=fresh.days):
            yield f"the newest {fresh.column} is {self.newest:%Y-%m-%d}, more than {fresh.days:g} days ago"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def check(contract: Contract, path: Path, today: datetime.datetime) -> list[str]:
    """Return what a table breaks of a contract, a line for each; empty if it keeps it.

    Args:
        today: with which the newest date is compared.

    Raises:
        InputError: the table cannot be read.
    """
    found = _Check(contract, today)
    for number, row in enumerate(refuse_faulty(read_rows(path), path), start=1):
        found.add(number, row)
    return [*found.faults()]


def require(contract: Path, tables: Iterable[Path]) -> None:
    """Check tables before they are used.

    Raises:
        InputError: one breaks the contract; the message names the first fault.
    """
    rules = read_contract(contract)
    for path in tables:
        if faults := check(rules, path, now()):
            others = f" ({len(faults) - 1} more: aisle watch {path} --contract {contract})" if len(faults) > 1 else ""
            raise InputError(f"{path} breaks {contract}: {faults[0]}{others}")


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
