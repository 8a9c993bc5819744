"""Measuring: how good a checkpoint, or what is served, is, and why it answers so."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from aisle.commands import Json, LabelColumn, TextColumn, report, show_metrics, show_rows
from aisle.console import stdout
from aisle.errors import InputError

app = typer.Typer()


@app.command()
def evaluate(
    what: Annotated[list[Path], typer.Argument(metavar="[CHECKPOINT] DATA", help="CHECKPOINT only without --url.")],
    url: Annotated[str, typer.Option(help="HOST:PORT of a running server to evaluate instead.")] = "",
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    held_out: Annotated[bool, typer.Option("--held-out", help="Only the fifth that training held out.")] = False,
    baselines: Annotated[
        Path | None, typer.Option(help="A table; an SVM and keyword rules fitted on its training part compete.")
    ] = None,
    page: Annotated[Path | None, typer.Option("--report", help="The HTML page to write.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint, or what a server answers, on labelled texts."""
    from aisle.train.evaluate import evaluate as run

    if len(what) != (1 if url else 2):
        raise InputError("give either CHECKPOINT DATA, or --url HOST:PORT DATA")
    checkpoint = None if url else what[0]
    result = run(
        what[-1],
        text_column,
        label_column,
        checkpoint=checkpoint,
        url=url,
        held_out=held_out,
        baselines=baselines,
        report=page,
    )
    report(result, as_json, _show_evaluation)


@app.command()
def frontier(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT…", help="As teacher and students.")],
    data: Annotated[Path, typer.Option(help="The training table; its held-out fifth is sent.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The page to write; a .json goes beside it.")] = Path(
        "loadtest/report/frontier.html"
    ),
    text_column: TextColumn = "text",
    label_column: LabelColumn = "category",
    precision: Annotated[
        list[str] | None, typer.Option(help="Give it once for each.", show_default="int8 and 16-bit floats")
    ] = None,
    callers: Annotated[int, typer.Option(min=1, max=8, help="Streams of texts at once.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each engine's throughput is measured.")] = 20.0,
    as_json: Json = False,
) -> None:
    """Build and serve checkpoints in several precisions: which is most accurate at which throughput."""
    from aisle.loadtest.frontier import frontier as run

    result = run(
        checkpoints,
        data,
        text_column,
        label_column,
        out,
        precisions=precision or (),
        callers=callers,
        seconds=seconds,
    )
    report(result, as_json, _show_frontier)


def _show_frontier(result: dict[str, Any]) -> None:
    from aisle.loadtest.frontier import COLUMNS

    shown = ("checkpoint", "precision", "megabytes", "accuracy", "macro_f1", "texts_per_second", "best")
    rows = [{**row, "best": "yes" if row.get("best") else ""} for row in result["rows"]]
    show_rows({name: COLUMNS[name] for name in shown}, rows)


@app.command()
def explain(
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]…", help="Texts to explain.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Ask a checkpoint, by integrated gradients.")] = None,
    url: Annotated[str, typer.Option(help="HOST:PORT of a running server; ask it, by leaving words out.")] = "",
    check: Annotated[
        Path | None, typer.Option(help="A table: leave out what decides in its held-out texts, and random words.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Texts of the table to check.")] = 200,
    text_column: TextColumn = "text",
    seed: int = 0,
    page: Annotated[Path | None, typer.Option("--report", help="The HTML page to write.")] = None,
    as_json: Json = False,
) -> None:
    """Show which words of a text decided its category, or check that such words do decide."""
    if check is None:
        from aisle.train.explain import explain as run

        report(run(texts or [], checkpoint=checkpoint, url=url, report=page), as_json, _show_explanations)
        return
    from aisle.train.deletion import check as run_check

    if texts or checkpoint is None:
        raise InputError("--check takes its texts from the table and needs --checkpoint DIR")
    result = run_check(check, text_column, checkpoint=checkpoint, url=url, rows=rows, seed=seed, report=page)
    report(result, as_json, _show_check)


def _show_explanations(result: dict[str, Any]) -> None:
    from aisle.train.explain import marks

    for explanation in result["explanations"]:
        stdout.print(Text(f"{explanation['category']}  {explanation['confidence']:.4f}", "bold"))
        for method in result["methods"]:
            line = Text(f"{method.replace('_', ' ')}: ")
            for piece, share in marks(explanation, method):
                line.append(piece, _shade(share))
            stdout.print(line)
        first = result["methods"][0]
        heaviest = sorted(explanation["words"], key=lambda word: -abs(word[first]))[:10]
        show_rows({"word": "word", **{name: name.replace("_", " ") for name in result["methods"]}}, heaviest)
        if explanation["unread_characters"]:
            stdout.print(f"cut off: the model does not read the last {explanation['unread_characters']} characters")
        if "completeness" in explanation:
            each = explanation["completeness"]
            stdout.print(f"integrated gradients add up to {each['sum']:+.4f} nats, with a gap of {each['gap']:+.4f}")


def _shade(share: float) -> str:
    """Return rich's style for a word: blue for the category, orange against it, the deeper the more."""
    if abs(share) < 0.05:
        return ""
    color = (31, 95, 168) if share > 0 else (200, 90, 0)
    red, green, blue = (round(255 + (part - 255) * 0.6 * abs(share)) for part in color)
    return f"black on rgb({red},{green},{blue})"


def _show_check(result: dict[str, Any]) -> None:
    columns = {"method": "words left out", "fall": "fall", "error": "± error", "changed": "changed", "area": "area"}
    show_rows(columns, result["methods"])
    stdout.print(
        f"{result['texts']} texts without {result['removed']:.0%} of their words: fall of the category's probability "
        f"from {result['confidence']:.4f}, share that changed category; area under the deletion curve"
    )


def _show_evaluation(result: dict[str, Any]) -> None:
    show_metrics(result)
    stdout.print("right among the first " + ", ".join(f"{k}: {share:.4f}" for k, share in result["top_k"].items()))
    for level in result["levels"]:
        stdout.print(f"level {level['level']}: accuracy {level['accuracy']:.4f}, macro-F1 {level['macro_f1']:.4f}")
    calibration = result["calibration"]
    stdout.print(f"calibration error {calibration['ece']:.4f}, temperature left {calibration['temperature']:.3f}")
    for point in result["coverage"]["wanted"]:
        if point["threshold"] is not None:
            answered = f"{point['coverage']:.1%} of the texts, those of confidence {point['threshold']:.4f} and more"
            stdout.print(f"{point['wanted']:.0%} accuracy on {answered}")
    for each in result.get("baselines", ()):
        stdout.print(f"{each['name']}: accuracy {each['accuracy']:.4f}, macro-F1 {each['macro_f1']:.4f}")
