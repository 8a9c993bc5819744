"""Cleaning a whole file: one pass over a table of any size, and a report of what was found in it."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from aisle.errors import InputError
from aisle.preprocess.clean import CleaningReport, TextError, content_key, prepare, prepare_label
from aisle.preprocess.near import PERMUTATIONS, Signer, neighbours
from aisle.preprocess.table import SURPLUS, Row, as_text, file_format, has_surplus, read_rows, require, write_rows
from aisle.report import Page

GROUPS = 20  # shown of a kind, largest first
SHOWN = 5  # rows of a group
CUT = 200  # characters of a text that is shown
CATEGORIES = 100  # in the table
BARS = 30  # in the plot
EDGES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 2**15 + 1)  # characters, for the histogram

_LETTER = re.compile(r"[^\W\d_]")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")

Mask = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
Track = Callable[[Iterable[Any]], Iterable[Any]]


class _Usable:
    """The rows that have a text and a label: themselves on disk, in memory what tells copies apart.

    That is about 200 bytes a row, however long its text is.
    """

    def __init__(self, folder: Path, near: bool) -> None:
        self.rows = array("q")  # number in the source, from 1
        self.labels = array("q")  # number in `names`
        self.first = array("q")  # the first row of the same content
        self.names: dict[str, int] = {}
        self._seen: dict[bytes, int] = {}
        self._spool = (folder / "rows").open("w+b")
        self._signatures = (folder / "signatures").open("w+b")
        self._sign = Signer() if near else None

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, number: int, row: Row, text: str, label: str) -> None:
        first = self._seen.setdefault(content_key(text), len(self))
        if first == len(self) and self._sign:
            self._signatures.write(self._sign(text).tobytes())
        self.rows.append(number)
        self.labels.append(self.names.setdefault(label, len(self.names)))
        self.first.append(first)
        pickle.dump(row, self._spool)  # unlike JSON, it keeps the types that Parquet has

    def signatures(self) -> npt.NDArray[np.uint32]:
        """Return a memory map of the signatures [contents, PERMUTATIONS], in the order of their first rows."""
        self._signatures.flush()
        return np.memmap(self._signatures, np.uint32, "r").reshape(-1, PERMUTATIONS)

    def read(self, wanted: Mask | None = None) -> Iterator[tuple[int, Row]]:
        """Yield the place and the row of each wanted one."""
        self._spool.seek(0)
        for place in range(len(self)):
            row = pickle.load(self._spool)
            if wanted is None or wanted[place]:
                yield place, row

    def close(self) -> None:
        self._spool.close()
        self._signatures.close()


def clean_file(
    source: Path,
    out: Path,
    text_column: str,
    label_column: str,
    near: float = 0.8,
    page: Path | None = None,
    track: Track = lambda rows: rows,
) -> dict[str, Any]:
    """Write to `out` the rows of `source` that are worth learning from, and a report of the others.

    Kept are the rows that `clean_rows` keeps, with text and label as it returns them and all other columns as they
    were; only the text column is scrubbed. Of near-duplicates under one label, the first is kept. Of near-duplicates
    under two labels, each label's first is kept and they are reported: some are errors for the catalogue's owner to
    correct, but most differ in the very word that decides ("integrated freezer", "integrated fridge freezer"), and a
    model that is not shown these pairs cannot learn it. Equal texts under two labels are dropped, for nothing decides.

    Args:
        near: the Jaccard similarity from which texts are near-duplicates; 0: none are looked for.
        page: the HTML report; by default `out` with the ending .report.html. The same figures go beside it as .json.
        track: wraps the stream of rows, to show progress.

    Returns:
        The figures of the report.

    Raises:
        InputError: the table cannot be read, lacks a column, or no row of it is left.
    """
    if file_format(out) and out.resolve() == source.resolve():
        raise InputError(f"{out} is the input; choose another output")
    if not 0 <= near <= 1:
        raise InputError(f"a near-duplicate threshold of {near:g} makes no sense; give 0 (off) or up to 1")
    page = page or out.with_name(out.name.removesuffix(".gz")).with_suffix(".report.html")
    if page.suffix.lower() != ".html":
        raise InputError(f"{page}: the report is a page; name it .html")
    report = CleaningReport()
    before: Counter[str] = Counter()
    personal: Counter[str] = Counter()
    columns: dict[str, None] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder,
        contextlib.closing(_Usable(Path(folder), near > 0)) as usable,
    ):
        # The source is read once. Whether a row is in conflict is known only when the last row has come, so those that
        # may be kept wait on disk.
        for number, row in enumerate(track(read_rows(source)), start=1):
            if number == 1:
                require(row, [text_column, label_column], source)
            report.rows_in += 1
            if has_surplus(row):
                report.drop("too many cells", number)
                continue
            row.pop(SURPLUS, None)
            columns.update(dict.fromkeys(row))
            try:
                label = prepare_label(as_text(row.get(label_column)))
                before[label] += 1
                text = prepare(as_text(row.get(text_column)), personal)
            except TextError as error:
                report.drop(error.reason, number)
                continue
            usable.add(number, {**row, text_column: text, label_column: label}, text, label)
        if not len(usable):
            why = "; ".join(
                f"{n} {reason}, as row {report.examples[reason][0]}" for reason, n in report.dropped.items()
            )
            raise InputError(f"{source}: no usable row ({why or 'it has none'})")

        verdict = _judge(usable, near)
        for reason, places in verdict.dropped.items():
            for place in np.flatnonzero(places):
                report.drop(reason, usable.rows[place])
        kept = ~np.logical_or.reduce(list(verdict.dropped.values()))
        report.rows_kept = int(kept.sum())
        if not report.rows_kept:
            raise InputError(f"{source}: no row is left; every text has conflicting labels, as row {usable.rows[0]}")

        after = np.bincount(np.array(usable.labels)[kept], minlength=len(usable.names)).tolist()
        result = {
            "source": str(source),
            "output": str(out),
            "report": str(page),
            "near": near,
            **asdict(report),
            "categories": {
                label: {"before": n, "after": after[usable.names[label]] if label in usable.names else 0}
                for label, n in before.most_common()
            },
            **_groups(usable, verdict, text_column, label_column),
            **_profile(as_text(row[text_column]) or "" for _, row in usable.read(kept)),
            "personal_data": dict(personal.most_common()),
        }
        writing = out.with_name(f".{out.name}.writing{''.join(out.suffixes)}")
        write_rows(writing, lambda: (row for _, row in usable.read(kept)), list(columns))
        writing.replace(out)
    _page(result).write(page, result)
    return result


class _Verdict(NamedTuple):
    """What each usable row is, by place."""

    dropped: dict[str, Mask]  # by reason; no row has two
    groups: dict[str, Integers]  # by kind; the row that heads each row's group, itself if it is in none


def _judge(usable: _Usable, near: float) -> _Verdict:
    labels, first = np.array(usable.labels), np.array(usable.first)
    place = np.arange(len(labels))
    disputed = np.zeros(len(labels), np.bool_)
    disputed[first[labels != labels[first]]] = True
    conflicting = disputed[first]
    leader, rival = place.copy(), place.copy()
    if near:
        contents = np.flatnonzero(first == place)
        found = neighbours(usable.signatures(), np.where(disputed[contents], -1, labels[contents]), near)
        leader[contents] = contents[found.leader]
        rival[contents] = np.where(found.rival < 0, contents, contents[found.rival])
    dropped = {
        "conflicting labels": conflicting,
        "duplicate": ~conflicting & (first != place),
        "near-duplicate": leader != place,
    }
    groups = {
        "conflicts": np.where(conflicting, first, place),
        "near_conflicts": rival,
        "near_duplicates": leader,
    }
    return _Verdict(dropped, groups)


def _groups(usable: _Usable, verdict: _Verdict, text_column: str, label_column: str) -> dict[str, Any]:
    """Return of each kind of group how many there are, how many rows they have, and the largest."""
    largest: dict[str, list[tuple[int, list[int]]]] = {}
    totals: dict[str, dict[str, int]] = {}
    wanted = np.zeros(len(usable), np.bool_)
    for kind, head in verdict.groups.items():
        joined = head != np.arange(len(head))
        heads, counts = np.unique(head[joined], return_counts=True)
        totals[kind] = {"groups": len(heads), "rows": int(counts.sum()) + len(heads)}
        order = np.argsort(-counts, kind="stable")[:GROUPS]
        largest[kind] = [
            (int(counts[i]) + 1, [int(heads[i]), *np.flatnonzero(joined & (head == heads[i]))[: SHOWN - 1].tolist()])
            for i in order
        ]
        for _, places in largest[kind]:
            wanted[places] = True
    examples = {
        place: {
            "row": usable.rows[place],
            "category": row[label_column],
            "text": row[text_column][:CUT],
        }
        for place, row in usable.read(wanted)
    }
    return {
        kind: {
            **totals[kind],
            "largest": [{"rows": n, "examples": [examples[p] for p in places]} for n, places in largest[kind]],
        }
        for kind in largest
    }


def _profile(texts: Iterable[str]) -> dict[str, Any]:
    """Return the languages and the lengths of texts."""
    languages: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    for text in texts:
        languages[script(text)] += 1
        lengths[len(text)] += 1
    sizes = np.array(sorted(lengths))
    rows = np.array([lengths[size] for size in sizes.tolist()])
    total = rows.cumsum()
    at = {f"p{q}": int(sizes[np.searchsorted(total, q / 100 * total[-1])]) for q in (50, 90, 99)}
    histogram, _ = np.histogram(sizes, EDGES, weights=rows)
    return {
        "languages": dict(languages.most_common()),
        "lengths": {
            "mean": round(float((sizes * rows).sum() / total[-1]), 1),
            **at,
            "longest": int(sizes[-1]),
            "histogram": [
                {"from": low, "to": high - 1, "rows": int(n)}
                for (low, high), n in zip(itertools.pairwise(EDGES), histogram, strict=True)
            ],
        },
    }


def script(text: str) -> str:
    """Return which script nine tenths of a text's letters belong to: Han, Latin, both together (mixed) or other."""
    letters = len(_LETTER.findall(text))
    if not letters:
        return "no letters"
    han, latin = len(_HAN.findall(text)), len(_LATIN.findall(text))
    shares = {"Han": han, "Latin": latin, "mixed": han + latin}
    return next((name for name, count in shares.items() if count >= 0.9 * letters), "other")


def _page(result: dict[str, Any]) -> Page:
    page = Page(
        f"Data quality of {Path(result['source']).name}",
        f"{result['rows_kept']} of {result['rows_in']} rows are kept, in {result['output']}. Rows are counted from 1, "
        "without the header; personal data is replaced.",
    )
    page.heading("Dropped rows")
    rows = [(why, n, ", ".join(map(str, result["examples"][why]))) for why, n in result["dropped"].items()]
    page.table(("reason", "rows", "first of them"), rows)

    page.heading("Categories")
    page.text(f"{len(result['categories'])} categories; the {CATEGORIES} largest are shown.")
    shown = list(result["categories"].items())[:CATEGORIES]
    page.table(("category", "rows before", "rows after"), [(name, n["before"], n["after"]) for name, n in shown])
    after = {name: n["after"] for name, n in shown[:BARS]}
    page.plot(_bars(after, "rows kept"), "Rows kept of each category")

    for kind, title, meaning in (
        ("conflicts", "Conflicting labels", "Equal texts under several labels; all are dropped. Correct the labels."),
        (
            "near_conflicts",
            "Near-duplicates under several labels",
            "They are kept: look for wrong labels among them, and leave those that differ in the word that decides.",
        ),
        ("near_duplicates", "Near-duplicates under one label", "The first is kept."),
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

    page.heading("Languages")
    page.text("By the script of nine tenths of a text's letters.")
    page.table(("script", "rows"), list(result["languages"].items()))
    page.plot(_bars(result["languages"], "rows kept"), "Rows kept by script")

    page.heading("Lengths")
    lengths = dict(result["lengths"])
    histogram = lengths.pop("histogram")
    page.table(("characters", *lengths), [("", *lengths.values())])
    bars = {f"{bar['from']} to {bar['to']}": bar["rows"] for bar in histogram}
    page.plot(_bars(bars, "rows kept"), "Rows kept by length in characters")

    page.heading("Personal data")
    page.text("Replaced in the text column, by kind; other columns are as they were.")
    page.table(("kind", "finds"), list(result["personal_data"].items()))
    return page


def _bars(values: dict[str, int], unit: str) -> Figure:
    figure = Figure(figsize=(8, 0.6 + 0.28 * len(values)))
    axes = figure.subplots()
    bars = axes.barh(list(values), list(values.values()))
    axes.bar_label(bars, padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
