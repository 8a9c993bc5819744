"""Another taxonomy's categories beside the model's: a table of pairs that a person confirmed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aisle.errors import InputError
from aisle.preprocess.tables.table import column, read_rows

COLUMNS = ("category", "taxonomy_id", "taxonomy")
ADDED = {"taxonomy_id": str, "taxonomy": str}  # columns of classified files
YES = {"yes", "y", "true", "1", "x", "是"}


class Counterpart(NamedTuple):
    """The category of the other taxonomy."""

    id: str
    path: str


def read_mapping(path: Path) -> dict[str, Counterpart]:
    """Read the confirmed pairs of a table that `aisle category map` wrote, by category.

    Raises:
        InputError: it cannot be read, lacks a column or a name, confirms two entries for one category or none at all,
            or has another word than yes under `confirmed`.
    """
    rows = list(read_rows(path))
    lacking = [name for name in (*COLUMNS, "confirmed") if not rows or name not in rows[0]]
    if lacking:
        raise InputError(f"{path} has no column {lacking[0]}; make the table with aisle category map")
    found: dict[str, Counterpart] = {}
    for number, values in enumerate(column(rows, [*COLUMNS, "confirmed"], path), start=1):
        category, id_, name, confirmed = ("" if value is None else str(value).strip() for value in values)
        if not confirmed:
            continue
        if confirmed.casefold() not in YES:
            raise InputError(f"{path}, row {number}: {confirmed!r} under confirmed; write yes or leave it empty")
        if not (category and name):
            raise InputError(f"{path}, row {number}: a name is missing; give category and taxonomy")
        if found.setdefault(category, own := Counterpart(id_, name)) != own:
            raise InputError(f"{path}, row {number}: {category!r} is confirmed twice; keep one")
    if not found:
        raise InputError(f"{path}: no row is confirmed; write yes under confirmed in the rows that are right")
    return found


def mapped(categories: Any, mapping: Mapping[str, Counterpart]) -> dict[str, Any]:
    """Return the new cells of a row: the counterparts of its category, or of each of its categories that has one."""
    if not isinstance(categories, list):
        found = mapping.get(categories)
        return {"taxonomy_id": found.id or None, "taxonomy": found.path} if found else dict.fromkeys(ADDED)
    pairs = dict.fromkeys(mapping[each] for each in categories if each in mapping)
    return {"taxonomy_id": [pair.id for pair in pairs], "taxonomy": [pair.path for pair in pairs]}
