"""The page that `aisle clean` writes: dropped rows and the reasons, categories, labels, languages, lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aisle.report import Page

GROUPS = 20  # of each kind, the largest first
CATEGORIES = 100  # in the table
BARS = 30  # in the plot


def quality_page(result: dict[str, Any]) -> Page:
    page = Page(
        f"Data quality of {Path(result['source']).name}",
        f"{result['rows_kept']} of {result['rows_in']} rows are kept, in {result['output']}. Rows are counted from 1, "
        "without the header; personal data is replaced.",
    )
    page.heading("Dropped rows")
    rows = [(why, n, ", ".join(map(str, result["examples"][why]))) for why, n in result["dropped"].items()]
    page.table(("reason", "rows", "first row numbers"), rows)
    _categories(page, result)
    _changed_labels(page, result)
    if "label_errors" in result:
        _label_errors(page, result["label_errors"])
    for column, found in result.get("fill", {}).items():
        _filled(page, column, found)
    _duplicates(page, result)
    _languages_and_lengths(page, result)
    page.heading("Personal data")
    page.text("Replaced in the text column, by kind. Other columns are not changed.")
    page.table(("kind", "replaced"), list(result["personal_data"].items()))
    return page


def _categories(page: Page, result: dict[str, Any]) -> None:
    page.heading("Categories")
    page.text(f"{len(result['categories'])} categories; the {CATEGORIES} largest are shown.")
    shown = list(result["categories"].items())[:CATEGORIES]
    page.table(("category", "rows before", "rows after"), [(name, n["before"], n["after"]) for name, n in shown])
    after = {name: n["after"] for name, n in shown[:BARS]}
    page.plot(_bars(after, "rows kept"), "Rows kept of each category")


def _label_errors(page: Page, found: dict[str, Any]) -> None:
    page.heading("Suspected labels")
    page.text(
        f"{found['suspects']} of {found['rows_judged']} labels are suspected, in {found['output']}; none is changed. "
        f"cleanlab estimates that {found['wrong']:.1%} are wrong. A model without an error would then measure an "
        f"accuracy of {found['reachable']:.1%} on labels like these. Texts that do not tell their category are not "
        "counted."
    )
    page.table(("level of the error", "suspects"), [(int(level), rows) for level, rows in found["by_level"].items()])
    page.text(f"The first {len(found['examples'])}, most probable first, a wrong upper level before a wrong leaf.")
    columns = {
        "row": "row",
        "category": "label",
        "confidence": "probability",
        "category_2": "suspected",
        "confidence_2": "its probability",
        "level": "level",
        "text": "text",
    }
    page.records(columns, found["examples"])


def _filled(page: Page, column: str, found: dict[str, Any]) -> None:
    page.heading(f"Filled values of {column}")
    page.text(fill_note(column, found))
    page.text(
        "Held out: known values are hidden and filled again. From products, one row at a time; from texts, a fifth of "
        "the products at a time. Lower bounds have 95 % confidence. Rows that lack a value for a reason, such as "
        "products without a brand, are not in this estimate."
    )
    columns = {"way": "filled from", "rows": "rows", "disputed": "left empty, because of several values"}
    columns |= {"hidden": "hidden", "again": "filled again", "precision": "precision", "at_least": "lower bound"}
    ways = [
        {"way": way, "rows": rows, "disputed": found["disputed"][way], "again": tested["filled"], **tested}
        for way, rows in found["filled"].items()
        for tested in [found["held_out"][way]]
    ]
    page.records(columns, ways)
    page.text(
        "Values in the texts of rows that lack one. A value is used if it is right in enough of the texts that contain "
        "it and whose value is known, by the lower bound."
    )
    figures = {"value": "value", "used": "used", "texts": "texts with it", "right": "right", "at_least": "lower bound"}
    page.records({**figures, "mentions": "rows that lack a value", "filled": "filled"}, found["values"])


def fill_note(column: str, found: dict[str, Any]) -> str:
    """Return a line about a column that was filled."""
    ways = ", ".join(
        f"{rows} from the {way}" + _estimate(found["held_out"][way]) for way, rows in found["filled"].items()
    )
    left = found["missing"] - sum(found["filled"].values())
    return f"{column}: {found['missing']} rows lack a value; filled: {ways}; left empty: {left}"


def _estimate(tested: dict[str, Any]) -> str:
    if not tested["filled"]:
        return " (no estimate)"
    return f" (held out: {tested['right']} of {tested['filled']} right, {tested['precision']:.1%})"


def _duplicates(page: Page, result: dict[str, Any]) -> None:
    for kind, title, meaning in (
        ("conflicts", "Conflicting labels", "Equal texts with different labels; all are dropped. Correct the labels."),
        (
            "near_conflicts",
            "Near-duplicates with different labels",
            "They are kept. Correct wrong labels, but leave texts that differ in the word that decides.",
        ),
        ("near_duplicates", "Near-duplicates with the same label", "The first is kept."),
    ):
        found = result[kind]
        page.heading(title)
        page.text(f"{meaning} {found['groups']} groups, {found['rows']} rows; the {GROUPS} largest are shown.")
        members = [
            (str(n), group["rows"], each["row"], each["category"], each["text"])
            for n, group in enumerate(found["largest"], start=1)
            for each in group["examples"]
        ]
        page.table(("group", "size", "row", "category", "text"), members)


def _languages_and_lengths(page: Page, result: dict[str, Any]) -> None:
    page.heading("Languages")
    page.text("The script of at least nine tenths of a text's letters.")
    page.table(("script", "rows"), list(result["languages"].items()))
    page.plot(_bars(result["languages"], "rows kept"), "Rows kept by script")
    page.heading("Lengths")
    lengths = dict(result["lengths"])
    histogram = lengths.pop("histogram")
    page.table(("characters", *lengths), [("", *lengths.values())])
    bars = {f"{bar['from']} to {bar['to']}": bar["rows"] for bar in histogram}
    page.plot(_bars(bars, "rows kept"), "Rows kept by length in characters")


def _changed_labels(page: Page, result: dict[str, Any]) -> None:
    """Show variants of labels, and the labels that were folded, merged or left out."""
    if result["label_variants"]:
        page.heading("Variants of labels")
        page.text("They differ only in case, spaces or width, and are kept apart; --fold-labels merges them.")
        page.table(("labels",), [(" | ".join(group),) for group in result["label_variants"][:CATEGORIES]])
    changed = [(old, new) for kind in ("folded", "merged") for old, new in result[kind].items()]
    changed += [(old, f"left out, {rows} rows") for old, rows in result["left_out"].items()]
    if changed:
        page.heading("Changed labels")
        page.table(("label", "new label"), changed[:CATEGORIES])


def _bars(values: dict[str, int], unit: str) -> Figure:
    figure = Figure(figsize=(8, 0.6 + 0.28 * len(values)))
    axes = figure.subplots()
    bars = axes.barh(list(values), list(values.values()))
    axes.bar_label(bars, padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
