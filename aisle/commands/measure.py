"""Measuring: evaluate and explain a checkpoint or a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from aisle.commands import (
    Json,
    LabelColumn,
    Page,
    Report,
    Seed,
    Table,
    TextColumn,
    check_columns,
    precisions,
    report,
    show_attributes,
    show_metrics,
    show_rows,
)
from aisle.commands.command import Stage, choices, file_to_read, refuse
from aisle.commands.tables import FoldLabels, LabelMap, labelling, reads_tables
from aisle.console import printable, show, stdout
from aisle.errors import InputError
from aisle.palette import BLUE, ORANGE, rgb

app = Stage()


@app.command()
@reads_tables
def evaluate(
    what: Annotated[
        list[Path], typer.Argument(metavar="[CHECKPOINT] DATA", help="Without --url, a checkpoint; and labelled texts.")
    ],
    url: Annotated[str, typer.Option(help="HOST:PORT of a running server, to evaluate it instead.")] = "",
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    held_out: Annotated[bool, typer.Option(help="Use only the fifth that training held out.")] = False,
    baselines: Annotated[
        Path | None,
        typer.Option(callback=file_to_read, help="A table to fit an SVM and keyword rules on, for comparison."),
    ] = None,
    membership: Annotated[
        bool, typer.Option(help="Also measure how well the loss tells the texts that CHECKPOINT was trained on.")
    ] = False,
    fold_labels: FoldLabels = False,
    label_map: LabelMap = None,
    page: Report = None,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint or a running server on labelled texts."""
    from aisle.train.evaluation.evaluate import evaluate as run

    if len(what) != (1 if url else 2):
        raise InputError("give either CHECKPOINT DATA, or --url HOST:PORT DATA")
    if membership and url:
        raise InputError("--membership needs the checkpoint, and a server does not tell losses; leave out --url")
    checkpoint = None if url else what[0]
    if baselines:
        check_columns([baselines], text_column, label_column)
    result = run(
        what[-1],
        text_column,
        label_column,
        checkpoint=checkpoint,
        url=url,
        held_out=held_out,
        baselines=baselines,
        report=page,
        labelling=labelling(fold_labels, label_map),
        membership=membership,
    )
    following = (f"measured {checkpoint}", "aisle", "build", checkpoint) if checkpoint else ()
    report(result, as_json, _show_evaluation, following)


@app.command()
@reads_tables
def frontier(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CHECKPOINT", help="Checkpoints, for example a teacher and its students.")
    ],
    data: Table,
    html: Page = Path("loadtest/report/frontier.html"),
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    precisions: Annotated[
        list[str] | None, choices(precisions, "A precision to build; repeatable.", "int8 and 16-bit floats")
    ] = None,
    callers: Annotated[int, typer.Option(min=1, max=8, help="Concurrent streams of texts.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds that each engine's throughput is measured.")] = 20.0,
    as_json: Json = False,
) -> None:
    """Compare the accuracy and throughput of checkpoints in several precisions, served by Triton."""
    from aisle.pipelines.frontier import frontier as run

    result = run(
        checkpoints,
        data,
        text_column,
        label_column,
        html,
        precisions=precisions or (),
        callers=callers,
        seconds=seconds,
    )
    report(result, as_json, _show_frontier)


def _show_frontier(result: dict[str, Any]) -> None:
    from aisle.pipelines.frontier import COLUMNS

    shown = ("checkpoint", "precision", "megabytes", "accuracy", "macro_f1", "texts_per_second", "best")
    rows = [{**row, "best": "yes" if row.get("best") else ""} for row in result["rows"]]
    show_rows({name: COLUMNS[name] for name in shown}, rows)


@app.command()
@reads_tables
def explain(
    ctx: typer.Context,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Texts to explain.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Explain a checkpoint's predictions, by integrated gradients.")
    ] = None,
    url: Annotated[
        str, typer.Option(help="HOST:PORT of a running server; explain its predictions, by leaving words out.")
    ] = "",
    check: Annotated[
        Path | None,
        typer.Option(
            callback=file_to_read,
            help="A table. Compare deleting the deciding words of its held-out texts with deleting random words.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Texts to check.")] = 200,
    text_column: TextColumn = "text",
    seed: Seed = 0,
    page: Report = None,
    as_json: Json = False,
) -> None:
    """Show which words of a text decided its category, or check with --check that such words do decide."""
    if check is None:
        refuse(ctx, "rows", "text_column", "seed", because="needs --check FILE")
        from aisle.train.evaluation.explain import explain as run

        report(run(texts or [], checkpoint=checkpoint, url=url, report=page), as_json, _show_explanations)
        return
    from aisle.train.evaluation.faithfulness import check as run_check

    if texts or checkpoint is None:
        raise InputError("--check reads its texts from the table, and needs --checkpoint DIR")
    result = run_check(check, text_column, checkpoint=checkpoint, url=url, rows=rows, seed=seed, report=page)
    report(result, as_json, _show_check)


def _show_explanations(result: dict[str, Any]) -> None:
    from aisle.train.evaluation.attribution import accounted, evidence, marks

    for explanation in result["explanations"]:
        stdout.print(Text(printable(f"{explanation['category']}  {explanation['confidence']:.4f}"), "bold"))
        for method in result["methods"]:
            line = Text(f"{method.replace('_', ' ')}: ")
            for piece, share in marks(explanation, method):
                line.append(printable(piece), _shade(share))
            stdout.print(line)
        shares = {name: [f"{share:+.1%}" for share in evidence(explanation, name)] for name in result["methods"]}
        first = result["methods"][0]
        order = sorted(range(len(explanation["words"])), key=lambda i: -abs(explanation["words"][i][first]))[:10]
        rows = [
            {"word": explanation["words"][i]["word"], **{name: column[i] for name, column in shares.items()}}
            for i in order
        ]
        show_rows({"word": "word", **{name: f"evidence by {name.replace('_', ' ')}" for name in shares}}, rows)
        if explanation["unread_characters"]:
            show(f"cut off: the model does not read the last {explanation['unread_characters']} characters")
        if sentence := accounted(explanation):
            show(sentence)


def _shade(share: float) -> str:
    """Return rich's style for a word: blue if it supports the category, orange if it opposes it, deeper for more."""
    if abs(share) < 0.05:
        return ""
    color = rgb(BLUE if share > 0 else ORANGE)
    red, green, blue = (round(255 + (part - 255) * 0.6 * abs(share)) for part in color)
    return f"black on rgb({red},{green},{blue})"


def _show_check(result: dict[str, Any]) -> None:
    columns = {"method": "deleted words", "fall": "drop", "error": "± error", "changed": "changed", "area": "area"}
    show_rows(columns, result["methods"])
    show(
        f"{result['texts']} texts without {result['removed']:.0%} of their words. drop: of the category's probability, "
        f"from {result['confidence']:.4f}; changed: share of texts that changed category; area: under the curve"
    )


def _show_evaluation(result: dict[str, Any]) -> None:
    show_metrics(result)
    if "mean_average_precision" in result:
        _show_multi_label(result)
        return
    if result["unseen_labels"]:
        rows = sum(each["rows"] for each in result["unseen_labels"])
        names = ", ".join(f"{each['label']} (predicted: {each['category']})" for each in result["unseen_labels"][:5])
        show(f"not counted, because the model does not know their labels: {rows} rows of {names}")
    show("top-k accuracy: " + ", ".join(f"{k}: {share:.4f}" for k, share in result["top_k"].items()))
    for level in result["levels"]:
        show(f"level {level['level']}: accuracy {level['accuracy']:.4f}, macro-F1 {level['macro_f1']:.4f}")
    calibration = result["calibration"]
    show(f"calibration error {calibration['ece']:.4f}, remaining temperature {calibration['temperature']:.3f}")
    for point in result["coverage"]["wanted"]:
        if point["threshold"] is not None:
            answered = f"{point['coverage']:.1%} of the texts, with confidence {point['threshold']:.4f} or more"
            show(f"{point['wanted']:.0%} accuracy on {answered}")
    if result["decisions"]:
        _show_decisions(result["decisions"])
    show_attributes(result.get("attributes", {}))
    if "membership" in result:
        attack = result["membership"]
        show(
            f"membership: the loss tells {attack['members']} texts of the training from {attack['others']} others with "
            f"an AUC of {attack['auc']:.3f} (0.5: not at all), and finds {attack['found']:.1%} at 1 % false alarms"
        )
    for each in result.get("baselines", ()):
        show(f"{each['name']}: accuracy {each['accuracy']:.4f}, macro-F1 {each['macro_f1']:.4f}")


def _show_multi_label(result: dict[str, Any]) -> None:
    sizes = result["categories_per_text"]
    show(f"categories per text: {sizes['actual']:.2f} in the table, {sizes['given']:.2f} given")
    if result["unseen_labels"]:
        names = ", ".join(f"{each['label']} ({each['rows']} rows)" for each in result["unseen_labels"][:5])
        show(f"not counted, because the model does not know them: {names}")


def _show_decisions(decisions: dict[str, Any]) -> None:
    for name, each in (("accepted", decisions["accepted"]), ("upper level only", decisions["parents"])):
        if each["rows"]:
            span = f"{each['low']:.4f} to {each['high']:.4f}"
            show(f"{name}: {each['share']:.1%} of the texts, precision {each['precision']:.4f} ({span})")
    show(f"to review: {decisions['review']:.1%} of the texts; unknown: {decisions['unknown']:.1%}")
    if unseen := decisions["unseen"]:
        show(
            f"of the texts with unknown labels: {unseen['unknown']:.1%} unknown, {unseen['accepted']:.1%} accepted; "
            f"AUROC {unseen['auroc']:.3f}"
        )
    sets = decisions["sets"]
    show(f"prediction sets: {sets['coverage']:.1%} hold the category; {sets['mean_size']:.2f} categories on average")
