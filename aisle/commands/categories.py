"""Categories: add one from a few examples, merge, rename and move them, all without training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from aisle.commands import (
    Checkpoint,
    Json,
    LabelColumn,
    Output,
    OutputTable,
    Overwrite,
    TextColumn,
    report,
    show_rows,
)
from aisle.commands.command import Group, Stage, file_to_read, refuse
from aisle.commands.tables import reads_tables, refuse_two_on_stdout, writes_tables
from aisle.console import say
from aisle.errors import InputError

app = Stage()
group = Stage(cls=Group, help="Add, merge, rename, move and map categories of a checkpoint, without training.")
app.add_typer(group, name="category")

Data = Annotated[
    Path | None,
    typer.Option(
        callback=file_to_read,
        help="The training table, for more texts than the checkpoint's sample has.",
        show_default=False,
    ),
]


def _name(metavar: str, description: str) -> Any:
    return typer.Argument(metavar=metavar, help=description)


@group.command()
@reads_tables
def add(
    ctx: typer.Context,
    checkpoint: Checkpoint,
    name: Annotated[str, _name("NAME", "The new category, such as 'Pets > Cat litter'.")],
    examples: Annotated[
        Path, typer.Option(callback=file_to_read, help="A table of texts of the new category, 5 or more.")
    ],
    out: Output,
    data: Data = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Add a category from a few examples, in seconds. The other categories may lose 0.2 points of accuracy at most.

    Its texts go to review until there are enough for a threshold. The next `aisle retrain` learns from the examples.
    """
    _needs_data(ctx, data)
    from aisle.train.categories.add import add as run

    with _opened(checkpoint, data, needs_texts=True) as folder:
        table = _table(data, text_column, label_column)
        result = run(folder, name, examples, out, text_column=text_column, table=table, overwrite=overwrite)
    _report(result, checkpoint, as_json)


@group.command()
@reads_tables
def merge(
    ctx: typer.Context,
    checkpoint: Checkpoint,
    categories: Annotated[list[str], _name("CATEGORY", "Two categories or more.")],
    into: Annotated[str, typer.Option(help="The name of the merged category; it may be one of theirs.")],
    out: Output,
    data: Data = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge categories into one, whose probability is about the sum of theirs."""
    _needs_data(ctx, data, "text_column")
    from aisle.train.categories.change import merge as run

    with _opened(checkpoint, data, needs_texts=True) as folder:
        table = _table(data, text_column, label_column)
        result = run(folder, categories, into, out, table=table, overwrite=overwrite)
    _report(result, checkpoint, as_json)


@group.command()
def rename(
    checkpoint: Checkpoint,
    old: Annotated[str, _name("OLD", "The category.")],
    new: Annotated[str, _name("NEW", "Its new name.")],
    out: Output,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Rename a category."""
    from aisle.train.categories.change import rename as run

    with _opened(checkpoint) as folder:
        result = run(folder, old, new, out, overwrite=overwrite)
    _report(result, checkpoint, as_json)


@group.command()
def move(
    checkpoint: Checkpoint,
    old: Annotated[str, _name("OLD", "A category, or a level with all categories below it, such as 'A > B'.")],
    new: Annotated[str, _name("NEW", "Its new path, such as 'C > B'.")],
    out: Output,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Move a category, or a level with all below it, to another path."""
    from aisle.train.categories.change import move as run

    with _opened(checkpoint) as folder:
        result = run(folder, old, new, out, overwrite=overwrite)
    _report(result, checkpoint, as_json)


@group.command("map")
@reads_tables
@writes_tables
def map_(
    ctx: typer.Context,
    checkpoint: Checkpoint,
    taxonomy: Annotated[
        Path,
        typer.Argument(
            metavar="TAXONOMY", callback=file_to_read, help="Google's or Shopify's text file: a path in each line."
        ),
    ],
    out: OutputTable,
    data: Data = None,
    candidates: Annotated[int, typer.Option(min=1, max=20, help="Proposals for each category.")] = 3,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    as_json: Json = False,
) -> None:
    """Propose for each category the entries of another taxonomy that it corresponds to, for a person to confirm.

    Write yes under `confirmed` in the rows that are right; `aisle classify FILE --taxonomy TABLE` uses these.
    """
    _needs_data(ctx, data, "text_column")
    refuse_two_on_stdout(out, as_json)
    from aisle.train.categories.taxonomy import propose

    with _opened(checkpoint, data, needs_texts=True) as folder:
        table = _table(data, text_column, label_column)
        result = propose(folder, taxonomy, out, table=table, candidates=candidates)
    done = f"{result['categories']} categories with proposals in {out}; write yes under confirmed where one is right"
    following = (done, "aisle", "classify", "FILE", "-o", "classified.csv", "--taxonomy", out)
    report(result, as_json, _show_best, () if str(out) == "-" else following)


def _show_best(result: dict[str, Any]) -> None:
    if result["output"] != "-":
        show_rows({"category": "category", "taxonomy": "best proposal", "score": "score"}, result["best"])


@contextmanager
def _opened(checkpoint: Path, data: Path | None = None, *, needs_texts: bool = False) -> Iterator[Path]:
    """Yield the checkpoint's folder; that of a converted copy if another classifier of transformers is given.

    Raises:
        InputError: it is no folder, or has no texts although they are needed.
    """
    from aisle.build.adopt import checkpoint_of
    from aisle.train.core.sample import FILE

    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: no such folder; give a checkpoint that aisle train made")
    if needs_texts and data is None and not (checkpoint / FILE).is_file():
        raise InputError(
            f"{checkpoint} has no sample of its texts ({FILE}); give a table of labelled texts with --data"
        )
    with checkpoint_of(checkpoint) as folder:
        yield folder


def _needs_data(ctx: typer.Context, data: Path | None, *columns: str) -> None:
    if data is None:
        refuse(ctx, "label_column", *columns, because="needs --data TABLE")


def _table(data: Path | None, text_column: str, label_column: str) -> Any:
    from aisle.train.categories.source import Table

    return None if data is None else Table(data, text_column, label_column)


def _report(result: dict[str, Any], checkpoint: Path, as_json: bool) -> None:
    out = result["checkpoint"]
    for note in result["notes"]:
        say(note)
    report({**result, "made_of": str(checkpoint)}, as_json, _show, (f"checkpoint in {out}", "aisle", "deploy", out))


def _show(result: dict[str, Any]) -> None:
    rows: list[dict[str, Any]] = []
    if held_out := result.get("held_out"):
        rows.append({"what": f"accuracy, {held_out['rows']} held-out texts", **held_out})
    if accepted := result.get("accepted"):
        for name, title in (("share", "of these accepted"), ("precision", "precision of these")):
            rows.append({"what": title, **{age: accepted[age][name] for age in ("before", "after")}})
    if rows:
        show_rows({"what": "", "before": "before", "after": "after"}, rows)
    if renamed := result.get("renamed"):
        show_rows({"old": "before", "new": "after"}, [{"old": old, "new": new} for old, new in renamed.items()])
