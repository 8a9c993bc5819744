"""Measure the attributes that further heads of a model give, on a table with their columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aisle.client import Failure, Prediction
from aisle.console import say
from aisle.errors import InputError
from aisle.preprocess.clean import content_key
from aisle.preprocess.labels import Labelling
from aisle.train.core.groups import read_groups
from aisle.train.core.heads import Head
from aisle.train.core.metrics import score

REFUSED = "(refused)"


def measure_attributes(
    data: Path,
    text_column: str,
    texts: Sequence[str],
    answers: Sequence[Prediction | Failure],
    labelling: Labelling,
    heads: Sequence[Head] = (),
) -> dict[str, Any]:
    """Return the scores of each attribute that the answers have, on the texts with a value in the column of its name.

    A value that the model does not know counts as an error, and so does a refused text. An attribute without a column
    is left out; one without any value is None.

    Args:
        texts: cleaned.
        labelling: how labels are changed; with `fold`, variants of a value fold into one.
        heads: those of the checkpoint; a server does not tell its values.
    """
    known = {head.name: head.labels for head in heads}
    names = dict.fromkeys(name for each in answers if isinstance(each, Prediction) for name in each.attributes or ())
    found: dict[str, Any] = {}
    for name in names:
        try:
            values = read_groups(data, text_column, name, options="a table like that of the training")
        except InputError as error:
            say(f"the attribute {name} is not measured: {error}")
            continue
        keys = (content_key(text) for text in texts)
        pairs = [(values[key], _value(each, name)) for key, each in zip(keys, answers, strict=True) if key in values]
        predicted = [value for _, value in pairs]
        own = replace(labelling, renamed={}, known=known.get(name, tuple(sorted({*predicted} - {REFUSED}))))
        actual = own.apply([value for value, _ in pairs])
        found[name] = {**score(actual, predicted), "rows": len(pairs)} if pairs else None
    return found


def _value(answer: Prediction | Failure, name: str) -> str:
    if isinstance(answer, Failure) or not answer.attributes or name not in answer.attributes:
        return REFUSED
    return answer.attributes[name].value
