"""Sets of categories: several categories for one text.

In CSV and spreadsheets, a cell has its categories separated by `|`, or is a JSON list. In JSON and Parquet it may be a
list of them. In memory a set is one string: its categories in alphabetical order, separated by `|`. So no category can
contain a `|`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from aisle.errors import InputError
from aisle.preprocess import labels as label_rules
from aisle.preprocess.clean import RARE, CleaningReport, Copies, LabelledTexts, group_copies, prepare_label
from aisle.preprocess.labels import BAR, Labelling
from aisle.preprocess.values import TextError

Names = tuple[str, ...]  # the categories of a text, in alphabetical order
Flags = npt.NDArray[np.bool_]
JOINED = "duplicate whose categories the first copy gets too"


def read_label_set(raw: object, renamed: Mapping[str, str]) -> Names:
    """Return the categories that a cell holds, after renaming.

    Args:
        raw: a list of categories, as it is or as JSON, or a text with `|` between them.

    Raises:
        TextError: it holds none, or one of them is missing or not a text.
        InputError: a category contains a `|`.
    """
    if isinstance(raw, str) and raw.lstrip().startswith("["):
        raw = _from_json(raw)
    if isinstance(raw, list | tuple):
        given = [prepare_label(each) for each in raw]
    else:
        given = [prepare_label(each) for each in prepare_label(raw).split(BAR)]
    if not given:
        raise TextError("label missing", "label is missing; give the row a category")
    names = {renamed.get(name, name) for name in given}
    if bad := next((name for name in sorted(names) if BAR in name), None):
        raise InputError(f"category {bad!r} contains {BAR!r}, which separates categories; rename it with --label-map")
    return tuple(sorted(names))


def _from_json(cell: str) -> object:
    """Return the list of texts that a cell holds as JSON; another cell as it is."""
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    return found if isinstance(found, list) and all(isinstance(each, str) for each in found) else cell


def note_on_sets(labels: Sequence[str]) -> str | None:
    """Return a note if no text has several categories, which is what a wrong separator looks like; else None.

    Args:
        labels: sets of categories, as `joined` returns them.
    """
    if any(BAR in label for label in labels):
        return None
    other = next((mark for mark in (";", ",", "/") if any(mark in label for label in labels)), None)
    example = next((label for label in labels if other and other in label), None)
    shown = f"; {example!r} is read as one category" if example else ""
    return f"no text has several categories{shown}; separate them with {BAR!r}, or leave out --multi-label"


def joined(names: Iterable[str]) -> str:
    """Return a set of categories as one label."""
    return BAR.join(sorted(names))


def indicators(label_sets: Sequence[str], names: Sequence[str]) -> Flags:
    """Return which categories each text has, [texts, categories].

    Args:
        label_sets: one label for each text, with categories among `names`; an empty label has none.
    """
    number = {name: place for place, name in enumerate(names)}
    found = np.zeros((len(label_sets), len(names)), np.bool_)
    for row, label in enumerate(label_sets):
        found[row, [number[name] for name in label.split(BAR) if label]] = True
    return found


def clean_label_sets(
    rows: Iterable[tuple[object, object]], labelling: Labelling, learnable: Callable[[str], bool]
) -> tuple[LabelledTexts, CleaningReport]:
    """Clean (text, set of categories) rows, as `clean_rows` does.

    Copies of a text do not conflict: the text gets the categories of all copies. A rare category leaves the sets, or
    its parent takes its place. A row without any category left is dropped.

    Raises:
        InputError: a category contains a `|`.
    """
    report = CleaningReport()
    texts, copies = group_copies(rows, lambda raw: read_label_set(raw, labelling.renamed), report)
    sets, dropped = _join_copies(copies)
    final = _final_names(sets, texts, labelling, learnable, report)
    table = LabelledTexts([], [], multi_label=True)
    for key, names in sets.items():
        kept = {name for each in names if (name := final[each]) is not None}
        if not kept:
            dropped.append((copies[key][0][0], RARE))
            continue
        table.texts.append(texts[key])
        table.labels.append(joined(kept))
    for row, reason in sorted(dropped):
        report.drop(reason, row)
    report.rows_kept = len(table.texts)
    return table, report


def _join_copies(copies: Copies[Names]) -> tuple[dict[bytes, Names], list[tuple[int, str]]]:
    """Return the categories of each content, and the rows to drop, with the reason."""
    sets: dict[bytes, Names] = {}
    dropped = []
    for key, group in copies.items():
        sets[key] = tuple(sorted({name for _, names in group for name in names}))
        first = group[0][1]
        dropped += [(row, "duplicate" if names == first else JOINED) for row, names in group[1:]]
    return sets, dropped


def _final_names(
    sets: Mapping[bytes, Names],
    texts: Mapping[bytes, str],
    labelling: Labelling,
    learnable: Callable[[str], bool],
    report: CleaningReport,
) -> dict[str, str | None]:
    """Return the final name of each category, None if it is left out, and complete the report."""
    written = Counter(chain.from_iterable(sets.values()))
    report.folded = label_rules.fold_variants(written, labelling.known) if labelling.fold else {}
    report.label_variants = [] if labelling.fold else label_rules.variant_groups(written)
    folded = {name: report.folded.get(name, name) for name in written}
    own = {key: {folded[name] for name in names} for key, names in sets.items()}
    counts = Counter(chain.from_iterable(own.values()))
    seen = Counter(chain.from_iterable(names for key, names in own.items() if learnable(texts[key])))
    parents = label_rules.merge_rare(counts, labelling.min_rows, seen)
    report.note_rare(parents, counts)
    return {name: parents.get(kept, kept) for name, kept in folded.items()}
