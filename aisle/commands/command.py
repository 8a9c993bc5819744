"""The base of every command: checks of the arguments, folders for the output, and Ctrl-C."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from aisle.console import detect_closed_output
from aisle.errors import InputError, Stopped
from aisle.preprocess.tables.place import as_argument, is_database

FOLDERS = "aisle.folders"  # key in the context's `meta`: the folders that the command will write into
ON_STDOUT = ("out", "label_errors")  # options whose "-" is standard output


class Command(TyperCommand):
    """A command of `aisle`. It does further checks, makes the output folders, and handles Ctrl-C."""

    def get_params(self, ctx: Any) -> list[Any]:
        return simplify_help(super().get_params(ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Show the arguments as DATA, [DATA] if it is optional, or DATA… if it is repeatable."""
        pieces = ["[OPTIONS]"]
        for param in self.get_params(ctx):
            if param.param_type_name == "argument":
                name = (param.metavar or param.name).upper()
                several = f"{name}…" if param.nargs != 1 and " " not in name else name
                pieces.append(several if param.required else f"[{several}]")
        return pieces

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if any(param.name == "data" and param.param_type_name == "argument" for param in self.params):
            args = _move_data_last(args)
        args = [as_argument(each) for each in _join_text_columns(args)]
        rest = super().parse_args(ctx, args)
        for name, value in ctx.params.items():
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(each, float) and not math.isfinite(each):
                    raise InputError(f"--{name.replace('_', '-')} {each}: give a finite number")
        _refuse_one_column_for_both(ctx.params)
        for param in self.params:
            _refuse_twice(param, ctx.params.get(param.name))
            if "--report" in param.opts:
                _refuse_report_over_input(param.name, ctx.params)
        return rest

    def invoke(self, ctx: Any) -> Any:
        try:
            for folder in ctx.meta.get(FOLDERS, ()):
                folder.mkdir(parents=True, exist_ok=True)
            with detect_closed_output():
                return super().invoke(ctx)
        except KeyboardInterrupt:  # before typer handles it
            raise Stopped("stopped") from None


class Group(TyperGroup):
    """Commands below one name, such as `aisle category add`."""

    def get_params(self, ctx: Any) -> list[Any]:
        return simplify_help(super().get_params(ctx))


class Stage(typer.Typer):
    """The commands of one stage."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        return super().command(name, cls=Command, **options)


def _refuse_twice(param: Any, value: Any) -> None:
    """Refuse a value that is given twice, such as a teacher, which would count double. Texts may be equal.

    Raises:
        InputError: a value is given twice; the message names it.
    """
    several = getattr(param, "multiple", False) or param.nargs == -1
    if not several or not value or str(param.metavar).startswith("TEXT"):
        return
    twice = next((each for i, each in enumerate(value) if each in value[:i]), None)
    if twice is not None:
        name = param.opts[0] if param.opts[0].startswith("-") else param.metavar
        raise InputError(f"{name}: {twice} is given twice; give it once")


def _refuse_one_column_for_both(values: dict[str, Any]) -> None:
    """Refuse one column as both text and label: a model would learn to repeat its input.

    Raises:
        InputError: the label's column is one of the text's, or one of these is given twice.
    """
    from aisle.preprocess.fields import columns_of

    label = values.get("label_column")
    if label and label in columns_of(values.get("text_column") or ""):
        raise InputError(f"--text-column and --label-column are both {label!r}; give two columns")


def _refuse_report_over_input(name: str, values: dict[str, Any]) -> None:
    """Refuse a report whose figures, in a .json beside the page, would replace an input.

    Raises:
        InputError: they would.
    """
    page = values.get(name)
    if not isinstance(page, Path):
        return
    figures = page.with_suffix(".json").resolve()
    others = (value for other, value in values.items() if other != name)
    for each in chain.from_iterable(value if isinstance(value, (list, tuple)) else (value,) for value in others):
        if isinstance(each, Path) and each.resolve() == figures:
            raise InputError(f"--report {page}: its figures would replace {each}; choose another name")


def _move_data_last(args: list[str]) -> list[str]:
    """Turn the earlier form `--data FILE` into the positional DATA, which comes last."""
    rest, tables = [], []
    words = iter(args)
    for word in words:
        if word == "--data":
            tables.append(next(words, ""))
        elif word.startswith("--data="):
            tables.append(word.removeprefix("--data="))
        else:
            rest.append(word)
    return rest + [table for table in tables if table]


def _join_text_columns(args: list[str]) -> list[str]:
    """Turn several `--text-column NAME` into one, with a plus between the names."""
    option = "--text-column"
    words = iter(args)
    rest, names = [], []
    for word in words:
        if word == option:
            names.append(next(words, ""))
        elif word.startswith(f"{option}="):
            names.append(word.removeprefix(f"{option}="))
        else:
            rest.append(word)
    if len(names) < 2:
        return args
    return [f"{option}={'+'.join(names)}", *rest]


def simplify_help(params: Iterable[Any]) -> list[Any]:
    """Make the help shorter: flags have no type and no default "off", and a range is an <int> or a <float>."""
    shown = list(params)
    for param in shown:
        if getattr(param, "is_bool_flag", False):
            param.display_type_rich = _no_type
            param.show_default = param.show_default and param.default is not False
        elif "display_type_rich" in dir(param) and "display_type_rich" not in vars(param):  # older typers lack it
            param.display_type_rich = partial(_plain_type, param.display_type_rich)
    return shown


def _no_type(ctx: Any) -> None:
    return None


def _plain_type(original: Callable[..., str | None], ctx: Any) -> str | None:
    name = original(ctx)
    return name and name.replace(" range>", ">")


@contextmanager
def resumable(then: str = "to resume") -> Iterator[None]:
    """On Ctrl-C, say what the same command does `then`."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(f"stopped; run the same command again {then}") from None


def given(ctx: typer.Context, *names: str) -> list[str]:
    """Return the options among `names` that are on the command line, as they are written."""
    present = [name for name in names if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    options = {param.name: param.opts[0] for param in ctx.command.params}
    return [options[name] for name in present]


def refuse(ctx: typer.Context, *names: str, because: str) -> None:
    """Refuse options that the command would ignore.

    Raises:
        InputError: one of them is on the command line.
    """
    ignored = given(ctx, *names)
    if ignored:
        raise InputError(f"{', '.join(ignored)}: {because}")


def file_to_write(ctx: typer.Context, param: typer.CallbackParam, path: Path | None) -> Path | None:
    """Check before the work that a file can be written. Its folder is made when the work begins.

    Raises:
        InputError: it cannot; the message says why. Also if it is "-" and the option takes no standard output.
    """
    if str(path) == "-" and param.name not in ON_STDOUT:
        raise InputError(f"{param.opts[0]} -: this is not written to standard output; name a file")
    if path is not None and is_database(path):
        raise InputError(f"cannot write {path}: only `aisle classify` writes to a database; name a file")
    if path is not None and path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; name a file")
    if path is not None and path.exists() and not path.is_file():
        raise InputError(f"cannot write {path}: it is a pipe or a device; name a file")
    return _to_write(ctx, path)


def table_to_write(ctx: typer.Context, param: typer.CallbackParam, path: Path | None) -> Path | None:
    """As `file_to_write`, or the address of a table of a database.

    Raises:
        InputError: it cannot be written.
    """
    return path if path is not None and is_database(path) else file_to_write(ctx, param, path)


def page_to_write(ctx: typer.Context, param: typer.CallbackParam, path: Path | None) -> Path | None:
    """As `file_to_write`, for an HTML page.

    Raises:
        InputError: it cannot be written, or is not named .html.
    """
    if path is not None and path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--report {path}: the report is an HTML page; name it .html")
    return file_to_write(ctx, param, path)


def folder_to_write(ctx: typer.Context, path: Path | None) -> Path | None:
    """As `file_to_write`, for a folder.

    Raises:
        InputError: it cannot be written.
    """
    if path is not None and path.exists() and not path.is_dir():
        raise InputError(f"cannot write {path}: it is a file; name a folder")
    return _to_write(ctx, path)


def _to_write(ctx: typer.Context, path: Path | None) -> Path | None:
    if path is None or str(path) == "-" or ctx.resilient_parsing:
        return path
    folder = path.absolute().parent
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    if not existing.is_dir():
        raise InputError(f"cannot write {path}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {path}: no permission to write in {existing}; choose another folder")
    ctx.meta.setdefault(FOLDERS, []).append(folder)
    return path


def among(known: Callable[[], Iterable[str]]) -> Callable[..., Any]:
    """Return a callback that checks before the work that all given names are known."""

    def check(ctx: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if each is not None and not ctx.resilient_parsing and each not in known():
                raise InputError(f"{param.opts[0]}: there is no {each!r}; choose from {', '.join(known())}")
        return value

    return check


def choices(known: Callable[[], Iterable[str]], description: str, default: str | bool = True) -> Any:
    """Return an option that takes names from a list, with completion.

    Args:
        known: returns the allowed names.
        default: what the help shows as the default.
    """
    return typer.Option(callback=among(known), autocompletion=known, help=description, show_default=default)


def file_to_read(ctx: typer.Context, path: Any) -> Any:
    """Check before the work that a file, or each of several, exists and can be read.

    Raises:
        InputError: a file cannot be read; the message names it.
    """
    for each in path if isinstance(path, (list, tuple)) else [path]:
        if each is None or str(each) == "-" or is_database(each) or ctx.resilient_parsing:
            continue
        if each.is_dir():
            raise InputError(f"{each} is a folder; name a file")
        if not each.exists():
            raise InputError(f"{each}: no such file")
        if not os.access(each, os.R_OK):
            raise InputError(f"{each}: no permission to read it")
    return path
