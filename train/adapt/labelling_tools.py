"""Labelling tools: write texts to review for Label Studio or Argilla, and read the labels that people gave there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from aisle.preprocess.tables.table import Row
from aisle.preprocess.values import TextError

CORRECTION = "correct_category"  # the column, choice or question for people to fill in
AGENT = "aisle"

Label = TypeVar("Label")
Part = TypeVar("Part", list[Any], dict[str, Any])


def label_studio_task(row: Row) -> Row:
    """Return a task of Label Studio with the model's category as a prediction, which people see as the first choice."""
    choice = {
        "from_name": CORRECTION,
        "to_name": "text",
        "type": "choices",
        "value": {"choices": [row["category"]]},
    }
    prediction = {"model_version": AGENT, "score": row["confidence"], "result": [choice]}
    return {"data": _without_correction(row), "predictions": [prediction]}


def argilla_record(row: Row) -> Row:
    """Return a record of Argilla 2 with the model's category as a suggestion."""
    suggestion = {"value": row["category"], "score": row["confidence"], "agent": AGENT}
    metadata = {name: value for name, value in _without_correction(row).items() if name != "text" and value is not None}
    return {"fields": {"text": row["text"]}, "metadata": metadata, "suggestions": {CORRECTION: suggestion}}


TOOLS: dict[str, Callable[[Row], Row]] = {"label-studio": label_studio_task, "argilla": argilla_record}


def _without_correction(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != CORRECTION}


class Disputed(ValueError):
    """People gave a text different labels, and none of them was given by more than half."""


def as_correction(row: Row) -> Row:
    """Return a row with the columns `text` and `correct_category`, from a table or from the JSON export of a tool.

    The label of more than half of the people counts. A text that nobody labelled has the correction None. A label that
    is not a string is returned as it is: `prepare_label` decides on it.

    Raises:
        Disputed: no label has so many.
        TextError: a part of the export has another form.
    """
    if isinstance(row.get("data"), dict) and {"annotations", "predictions"} & row.keys():
        people = _of_annotations(row.get("annotations"))
        return {"text": row["data"].get("text"), CORRECTION: _agreed(people)}
    if isinstance(row.get("fields"), dict) and {"responses", "suggestions"} & row.keys():
        people = _of_responses(row.get("responses"))
        return {"text": row["fields"].get("text"), CORRECTION: _agreed(people)}
    return row


def _of_annotations(annotations: Any) -> list[Any]:
    """Return the label that each person gave in Label Studio. Skipped texts have none."""
    found = []
    for annotation in _part(annotations, list, "annotations"):
        if _part(annotation, dict, "annotation").get("was_cancelled"):
            continue
        labels: list[Any] = []
        for result in _part(annotation.get("result"), list, "result"):
            if _part(result, dict, "result").get("from_name") == CORRECTION:
                choices = _part(result.get("value"), dict, "value").get("choices") or []
                labels += choices if isinstance(choices, list) else [choices]
        if len(labels) > 1:
            raise TextError("label not text", f"a person chose {len(labels)} labels; allow one choice in the project")
        found += labels
    return found


def _of_responses(responses: Any) -> list[Any]:
    """Return the label that each person gave in Argilla. Discarded answers and drafts do not count."""
    answers = _part(_part(responses, dict, "responses").get(CORRECTION), list, "responses")
    kept = [each for each in answers if _part(each, dict, "response").get("status", "submitted") == "submitted"]
    return [each["value"] for each in kept if each.get("value") is not None]


def _part(value: Any, kind: type[Part], name: str) -> Part:
    """Return a part of an export; an empty one if it is missing."""
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise TextError("damaged export", f"{name} is {value!r}; export it again as JSON")
    return value


def _agreed(labels: list[Any]) -> Any:
    """Return the label that more than half of the people gave; None if there are no people."""
    if not all(isinstance(label, str) for label in labels):
        return next(label for label in labels if not isinstance(label, str))
    if not labels:
        return None
    return majority(labels)


def majority(labels: Sequence[Label]) -> Label:
    """Return the label that more than half of the people gave.

    Raises:
        Disputed: there is none.
    """
    ((label, most),) = Counter(labels).most_common(1)
    if 2 * most <= len(labels):
        raise Disputed(", ".join(map(str, dict.fromkeys(labels))))
    return label
