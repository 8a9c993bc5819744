"""Spreadsheets: calamine reads .xlsx and .xls, XlsxWriter writes .xlsx row by row."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from aisle.console import say_once
from aisle.errors import InputError
from aisle.extras import install
from aisle.preprocess.tables.passthrough import EXACT, cell, encodable

ROWS = 1_048_575  # of a sheet, without the header
CHARACTERS = 32_767  # of a cell


def sheet_rows(path: Path, where: Path) -> Iterator[list[Any]]:
    """Yield the rows of the first sheet that is not empty; hidden sheets count only if all are hidden.

    Empty cells are None, and whole numbers are integers.

    Raises:
        InputError: the file is not a spreadsheet, or the extra is missing.
    """
    try:
        import python_calamine
    except ImportError:
        raise InputError(f"spreadsheets need an extra: {install('excel')}") from None
    try:
        book = python_calamine.CalamineWorkbook.from_path(str(where))
        shown = [each.name for each in book.sheets_metadata if each.visible == python_calamine.SheetVisibleEnum.Visible]
        sheets = [(name, book.get_sheet_by_name(name)) for name in shown or book.sheet_names]
    except Exception as error:  # calamine raises many kinds
        raise InputError(f"{path}: not a spreadsheet that can be read: {' '.join(str(error).split())}") from None
    filled = [(name, sheet) for name, sheet in sheets if sheet.height]
    if len(filled) > 1:
        say_once(f"{path} has {len(filled)} sheets; {filled[0][0]!r} is read")
    for _, sheet in filled[:1]:
        for row in sheet.iter_rows():
            yield [_value(each) for each in row]


def _value(value: Any) -> Any:
    if value == "":
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return int(value)
    return value


def require_fit(value: Any, path: Path, row: int) -> None:
    """Raise InputError if a spreadsheet cannot hold the value, or has too few rows."""
    if row > ROWS:
        raise InputError(f"{path}: a sheet holds {ROWS:,} rows, and the table has more; write .csv or .parquet")
    if value is None or isinstance(value, bool | int | float):
        return
    text = cell(value)
    if isinstance(text, str) and len(text) > CHARACTERS:
        raise InputError(
            f"{path}: row {row} has {len(text)} characters in a cell, and a sheet holds {CHARACTERS}; write .csv"
        )


def write_sheet(path: Path, rows: Iterable[dict[str, Any]], columns: list[str]) -> None:
    """Write rows to .xlsx in constant memory. Text stays text, even if it looks like a number or a formula.

    Raises:
        InputError: a sheet cannot hold the rows, or the extra is missing.
    """
    try:
        import xlsxwriter
    except ImportError:
        raise InputError(f"spreadsheets need an extra: {install('excel')}") from None
    with (
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder,
        xlsxwriter.Workbook(str(path), {"constant_memory": True, "tmpdir": folder}) as book,
    ):
        sheet = book.add_worksheet()
        for place, name in enumerate(columns):
            sheet.write_string(0, place, encodable(name))
        for number, row in enumerate(rows, start=1):
            for place, name in enumerate(columns):
                require_fit(row.get(name), path, number)
                _write(sheet, number, place, cell(row.get(name)))


def _write(sheet: Any, row: int, column: int, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, int | float) and abs(value) < EXACT:
        sheet.write_number(row, column, value)
    else:
        sheet.write_string(row, column, encodable(str(value)))
