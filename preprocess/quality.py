"""Clean a whole file: a table of any size, in memory that does not depend on the length of its texts, and a report."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aisle.errors import InputError
from aisle.preprocess import labels as label_rules
from aisle.preprocess.clean import RARE, CleaningReport, LabelledTexts, content_key, prepare, prepare_label
from aisle.preprocess.fields import columns_of
from aisle.preprocess.fill import Filled, Filler, Filling, types_of
from aisle.preprocess.labels import Labelling
from aisle.preprocess.near import PERMUTATIONS, Signer, neighbours
from aisle.preprocess.quality_report import GROUPS, quality_page
from aisle.preprocess.tables.opening import PACKED, STDIO
from aisle.preprocess.tables.table import NAMING, FaultyRow, Row, as_text, checked, read_rows
from aisle.preprocess.tables.writing import output_kind, refuse_same, replacing, write_edited
from aisle.preprocess.text_profile import profile
from aisle.preprocess.values import TextError

SHOWN = 5  # rows of a group in the report
CUT = 200  # characters of a text in the report

Mask = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
Track = Callable[[Iterable[Any]], Iterable[Any]]
Examine = Callable[[Sequence[int], LabelledTexts], dict[str, Any]]  # row numbers and rows -> figures about the labels


@dataclass
class _Scan:
    """What the first pass over a table found."""

    report: CleaningReport = field(default_factory=CleaningReport)
    rows_by_label: Counter[str] = field(default_factory=Counter)  # labels as they are written
    personal: Counter[str] = field(default_factory=Counter)  # replaced personal data, by kind
    columns: dict[str, None] = field(default_factory=dict)


class _Usable:
    """The rows with a usable text and label. The texts are on disk; memory holds about 200 bytes for each row."""

    def __init__(self, folder: Path, near: bool) -> None:
        self.rows = array("q")  # number in the source, from 1
        self.labels = array("q")  # number in `names`
        self.first = array("q")  # place of the first row with the same content
        self.names: dict[str, int] = {}
        self._seen: dict[bytes, int] = {}
        self._spool = (folder / "rows").open("w+b")
        self._signatures = (folder / "signatures").open("w+b")
        self._sign = Signer() if near else None

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, number: int, text: str, label: str) -> None:
        first = self._seen.setdefault(content_key(text), len(self))
        if first == len(self) and self._sign:
            self._signatures.write(self._sign(text).tobytes())
        self.rows.append(number)
        self.labels.append(self.names.setdefault(label, len(self.names)))
        self.first.append(first)
        pickle.dump(text, self._spool)

    def signatures(self) -> npt.NDArray[np.uint32]:
        """Return a memory map of the signatures [contents, PERMUTATIONS], in the order of their first rows."""
        self._signatures.flush()
        return np.memmap(self._signatures, np.uint32, "r").reshape(-1, PERMUTATIONS)

    def read(self, wanted: Mask) -> Iterator[tuple[int, str]]:
        """Yield the place and the cleaned text of each wanted row."""
        self._spool.seek(0)
        for place in range(len(self)):
            text = pickle.load(self._spool)
            if wanted[place]:
                yield place, text

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
    labelling: Labelling = Labelling(),  # noqa: B008 - it is frozen
    examine: Examine | None = None,
    filling: Filling | None = None,
) -> dict[str, Any]:
    """Write the rows of `source` that training can use to `out`, and report the others.

    The rows are those that `clean_rows` keeps, with the texts and labels that it returns. Other columns do not change;
    only the text column is scrubbed. Among near-duplicates with the same label, the first is kept. Among
    near-duplicates with different labels, the first of each label is kept, and the report lists them. Some of these
    labels are wrong and the catalogue's owner should correct them. But most such texts differ in the word that decides
    ("integrated freezer", "integrated fridge freezer"), and a model can only learn this word from such pairs. Equal
    texts with different labels are dropped, because no word decides.

    Args:
        near: the Jaccard similarity from which texts are near-duplicates; 0 turns the search for them off.
        page: the HTML report; by default `out` with the ending .report.html. A .json file with the same figures is
            written beside it.
        track: wraps the stream of rows, to show progress.
        labelling: how labels are changed.
        examine: looks for wrong labels among the rows that are kept, whose texts are then all in memory. It changes
            nothing; its figures become `label_errors` of the report.
        filling: the columns whose missing values are filled; the figures become `fill` of the report.

    Returns:
        The figures of the report.

    Raises:
        InputError: the table cannot be read or lacks a column, or no row is left.
    """
    kind = output_kind(source, out)
    refuse_same(source, out)
    if len(columns_of(text_column)) > 1:
        raise InputError(f"--text-column {text_column}: give one column; aisle train cleans several by itself")
    filling = filling or Filling([])
    filling.check(text_column, label_column)
    page = _page_of(out, page, near)
    beside = None if out == STDIO else out.parent
    if beside:
        beside.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=beside) as folder,
        contextlib.closing(_Usable(Path(folder), near > 0)) as usable,
    ):
        # Conflicts are known only after the last row, so the texts wait on disk.
        filler = Filler(filling)
        rows = checked(track(read_rows(source)), [text_column, label_column, *filling.names], source, _naming(filling))
        scan = _scan(rows, usable, filler, text_column, label_column, labelling)
        if not len(usable):
            raise _nothing_usable(source, scan.report)
        duplicates = _find_duplicates(usable, near)
        kept, final = _choose(usable, duplicates, scan.report, labelling)
        if not scan.report.rows_kept:
            why = "; ".join(f"{n} {reason}" for reason, n in scan.report.dropped.items())
            raise InputError(f"{source}: no row is left ({why})")
        files = {"source": str(source), "output": str(out), "report": str(page) if page else None}
        result = {**files, "near": near, **_figures(usable, scan, duplicates, kept, final)}
        filled = filler.fill(np.array(usable.first), kept, usable.read)
        if filled:
            result["fill"] = {each.name: each.figures for each in filled}
        if examine:
            result["label_errors"] = examine(*_kept_rows(usable, kept, final))
        columns = {text_column: str, label_column: str, **types_of(filled)}
        edits = partial(_edits, usable, kept, final, [text_column, label_column], filled, scan.report.rows_in)
        with replacing(out) as writing:
            write_edited(source, writing, edits, list(scan.columns), columns, kind=kind)
    if page:
        quality_page(result).write(page, result)
    return result


def _nothing_usable(source: Path, report: CleaningReport) -> InputError:
    reasons = (f"{n} {reason}, for example row {report.examples[reason][0]}" for reason, n in report.dropped.items())
    return InputError(f"{source}: no usable row ({'; '.join(reasons) or 'it has none'})")


def _figures(
    usable: _Usable, scan: _Scan, duplicates: _Duplicates, kept: Mask, final: list[str | None]
) -> dict[str, Any]:
    """Return the figures of the report."""
    before = scan.rows_by_label
    after = Counter(final[usable.labels[place]] for place in np.flatnonzero(kept))
    return {
        **asdict(scan.report),
        "categories": {
            label: {"before": before[label], "after": after[label]}
            for label in dict.fromkeys([*(label for label, _ in before.most_common()), *after])
        },
        **_groups(usable, duplicates),
        **profile(text for _, text in usable.read(kept)),
        "personal_data": dict(scan.personal.most_common()),
    }


def _kept_rows(usable: _Usable, kept: Mask, final: list[str | None]) -> tuple[list[int], LabelledTexts]:
    """Return the row numbers of the kept rows, and the rows."""
    texts = [text for _, text in usable.read(kept)]
    places = np.flatnonzero(kept).tolist()
    labels = [str(final[usable.labels[place]]) for place in places]
    return [usable.rows[place] for place in places], LabelledTexts(texts, labels)


def _edits(
    usable: _Usable, kept: Mask, final: list[str | None], columns: list[str], filled: list[Filled], rows: int
) -> Iterator[Row | None]:
    """Yield the new text and label of each of the source's `rows`, None for a row that is dropped."""
    done = 0
    for place, text in usable.read(kept):
        yield from itertools.repeat(None, usable.rows[place] - done - 1)
        edit: Row = dict(zip(columns, (text, final[usable.labels[place]]), strict=True))
        for each in filled:
            edit |= each.edit(place)
        yield edit
        done = usable.rows[place]
    yield from itertools.repeat(None, rows - done)


def _page_of(out: Path, page: Path | None, near: float) -> Path | None:
    """Return the path of the report. If the table goes to standard output, the default is no report."""
    if not 0 <= near <= 1:
        raise InputError(f"the near-duplicate threshold {near:g} is out of range; give 0 (off) to 1")
    if page is None:
        name = out.name
        for packed in PACKED:
            name = name.removesuffix(packed)
        return None if out == STDIO else out.with_name(name).with_suffix(".report.html")
    if page.suffix.lower() != ".html":
        raise InputError(f"{page}: the report is an HTML page; name it .html")
    return page


def _naming(filling: Filling) -> str:
    """Return the options that name columns."""
    return NAMING.replace(" or ", ", ") + ", --fill or --fill-by" if filling.columns else NAMING


def _scan(
    rows: Iterable[Row], usable: _Usable, filler: Filler, text_column: str, label_column: str, labelling: Labelling
) -> _Scan:
    """Read all rows, and add those with a text and a label to `usable` and `filler`."""
    scan = _Scan()
    for number, row in enumerate(rows, start=1):
        scan.report.rows_in += 1
        if isinstance(row, FaultyRow):
            scan.report.drop(row.reason, number)
            continue
        scan.columns.update(dict.fromkeys(row))
        filler.refuse_marks(row)
        try:
            label = prepare_label(as_text(row.get(label_column)))
            scan.rows_by_label[label] += 1
            text = prepare(as_text(row.get(text_column)), scan.personal)
        except TextError as error:
            scan.report.drop(error.reason, number)
            continue
        usable.add(number, text, labelling.renamed.get(label, label))
        filler.add(row)
    return scan


def _choose(
    usable: _Usable, duplicates: _Duplicates, report: CleaningReport, labelling: Labelling
) -> tuple[Mask, list[str | None]]:
    """Return which rows are kept, and the final name of each label, None if it is left out. Complete the report."""
    names = list(usable.names)
    written = np.bincount(usable.labels, minlength=len(names)).tolist()
    if labelling.fold:
        report.folded = label_rules.fold_variants(dict(zip(names, written, strict=True)))
    else:
        report.label_variants = label_rules.variant_groups(names)
    kept = ~np.logical_or.reduce(list(duplicates.dropped.values()))
    folded = [report.folded.get(name, name) for name in names]
    counts = Counter(folded[number] for number in np.array(usable.labels)[kept])
    parents = label_rules.merge_rare(counts, labelling.min_rows)
    report.note_rare(parents, counts)
    final = [parents.get(name, name) for name in folded]
    left_out = np.array([name is None for name in final])[np.array(usable.labels)] & kept
    for reason, places in {**duplicates.dropped, RARE: left_out}.items():
        for place in np.flatnonzero(places):
            report.drop(reason, usable.rows[place])
    kept &= ~left_out
    report.rows_kept = int(kept.sum())
    return kept, final


class _Duplicates(NamedTuple):
    """Equal and near-equal rows among the usable ones; arrays are indexed by place."""

    dropped: dict[str, Mask]  # the rows to drop, by reason; a row has at most one reason
    groups: dict[str, Integers]  # by kind: the place of the first row of each row's group; its own if it has no group


def _find_duplicates(usable: _Usable, near: float) -> _Duplicates:
    # Labels that differ only in case, spaces or width do not conflict.
    keys: dict[str, int] = {}
    key_of = np.array([keys.setdefault(label_rules.variant_key(name), len(keys)) for name in usable.names])
    labels, first = key_of[np.array(usable.labels)], np.array(usable.first)
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
    return _Duplicates(dropped, groups)


def _groups(usable: _Usable, duplicates: _Duplicates) -> dict[str, Any]:
    """Return, for each kind of group, the number of groups, the number of their rows, and the largest groups."""
    largest: dict[str, list[tuple[int, list[int]]]] = {}
    totals: dict[str, dict[str, int]] = {}
    wanted = np.zeros(len(usable), np.bool_)
    for kind, head in duplicates.groups.items():
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
    names = list(usable.names)
    examples = {
        place: {"row": usable.rows[place], "category": names[usable.labels[place]], "text": text[:CUT]}
        for place, text in usable.read(wanted)
    }
    return {
        kind: {
            **totals[kind],
            "largest": [{"rows": n, "examples": [examples[p] for p in places]} for n, places in largest[kind]],
        }
        for kind in largest
    }
