"""The options of all commands that read or write tables."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from aisle.commands.command import file_to_read
from aisle.commands.options import Command, with_options
from aisle.console import say
from aisle.errors import InputError
from aisle.preprocess.clean import CleaningReport
from aisle.preprocess.fields import PLUS, columns_of
from aisle.preprocess.labels import Labelling, read_label_map
from aisle.preprocess.tables.databases import forget
from aisle.preprocess.tables.opening import Reading, set_reading
from aisle.preprocess.tables.table import unnamed
from aisle.preprocess.tables.writing import BOM

WRITTEN = (
    "out",
    "page",
    "label_errors",
    "propose_contract",
    "log",
    "log_dir",
    "repository",
)  # options that name no file to read

Delimiter = Annotated[
    str, typer.Option(help="Delimiter of the input, such as ';' or '\\t'.", show_default="as the file's name says")
]
Encoding = Annotated[str, typer.Option(help="Encoding of the input, such as gb18030 or cp1252.", show_default="UTF-8")]
Header = Annotated[
    bool,
    typer.Option(help="The first line names the columns; with --no-header they are text, category, column_3, …"),
]
Bom = Annotated[bool, typer.Option(help="Start CSV output with a byte order mark, for Excel.")]
Contract = Annotated[
    Path | None, typer.Option(callback=file_to_read, help="Refuse DATA if it breaks this contract, a .toml file.")
]
FoldLabels = Annotated[bool, typer.Option(help="Merge labels that differ only in case, spaces or width.")]
LabelMap = Annotated[Path | None, typer.Option(help="A table with the columns from and to, to rename labels.")]
MinRows = Annotated[
    int, typer.Option(min=0, help="A category with fewer rows joins its parent (A of 'A > B') or is left out.")
]


def reads_tables(command: Command) -> Command:
    """Add the options for reading tables to a command."""

    def before(options: dict[str, Any], arguments: dict[str, Any]) -> None:
        delimiter = {"\\t": "\t", "tab": "\t"}.get(options["delimiter"], options["delimiter"])
        reading = Reading(delimiter, options["encoding"], options["header"])
        set_reading(reading)
        forget()
        if reading != Reading():
            _refuse_unused(reading, arguments)
        if contract := options.get("contract"):
            from aisle.preprocess.contract import require

            given = arguments["data"]
            if not given:
                raise InputError("--contract needs DATA, the table that it checks")
            require(contract, given if isinstance(given, list) else [given])
        if not options["header"]:
            for name in ("text_column", "label_column"):
                words = columns_of(arguments.get(name) or "")
                if all(word.isdigit() for word in words):
                    arguments[name] = PLUS.join(unnamed(int(word)) for word in words)

    added: dict[str, tuple[Any, Any]] = {
        "delimiter": (Delimiter, ""),
        "encoding": (Encoding, ""),
        "header": (Header, True),
    }
    own = inspect.signature(command).parameters
    if "data" in own and "contract" not in own:
        added["contract"] = (Contract, None)
    return with_options(command, added, before)


def writes_tables(command: Command) -> Command:
    """Add the options for writing tables to a command."""
    return with_options(command, {"bom": (Bom, False)}, lambda options, _: (BOM.set(options["bom"]), None)[1])


def labelling(fold: bool, label_map: Path | None, min_rows: int = 0) -> Labelling:
    """Return the labelling that the options describe.

    Raises:
        InputError: the label map cannot be read.
    """
    return Labelling(read_label_map(label_map) if label_map else {}, fold, min_rows)


def note_labels(result: dict[str, Any]) -> None:
    """Print notes about unusual and changed labels on stderr."""
    fields = CleaningReport.__dataclass_fields__
    for note in CleaningReport(**{name: result[name] for name in fields}).notes():
        say(note)


def refuse_two_on_stdout(out: Path, as_json: bool) -> None:
    """Refuse to print both a table and JSON on stdout."""
    if str(out) == "-" and as_json:
        raise InputError("-o - and --json would both write to standard output; choose one")


def _refuse_unused(reading: Reading, arguments: dict[str, Any]) -> None:
    """Refuse options that apply to none of the command's files."""
    from aisle.preprocess.tables.opening import kind_of_name

    read = [value for name, value in arguments.items() if name not in WRITTEN]
    given = [each for value in read for each in (value if isinstance(value, list) else [value])]
    names = [str(each) for each in given if isinstance(each, Path | str) and str(each)]
    kinds = {kind_of_name(name) for name in names} | ({"csv"} if "-" in names else set())
    kinds |= {"csv"} if any(name.lower().endswith(".zip") for name in names) else set()
    if (reading.delimiter or not reading.header) and not kinds & {"csv", "tsv", "xlsx", "xls"}:
        raise InputError("--delimiter and --no-header are for .csv and .tsv files; none is read")
    if reading.encoding and not kinds & {"csv", "tsv", "txt", "jsonl", "json"}:
        raise InputError("--encoding is for text files; none is read")
