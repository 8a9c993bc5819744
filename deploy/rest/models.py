"""The bodies of /v1: what is checked, and what OpenAPI describes."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from aisle.client import Prediction
from aisle.deploy.rest.errors import Fault

Body = TypeVar("Body", bound=BaseModel)
EXAMPLE: dict[str, Any] = {"texts": ["红富士苹果 5斤装", "usb c cable 2m"], "top_k": 3}
# What may stand for a text; `aisle.preprocess.values` decides. OpenAPI does not see this from `Any`.
TEXT_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "number"}]}
DECISIONS = "Also answer what to do with each text: accept, review or unknown. 422 if the model has no decisions."
ATTRIBUTES = "Also answer the attributes, such as the brand, of a model with further heads. 422 if it has none."
TOP_K = (
    "Number of categories for each text, from 1 to the model's number of categories. Without it, a model gives one "
    "category; a multi-label model gives those that reach their thresholds, which may be none."
)


class ClassifyRequest(BaseModel):
    """Texts to classify, at most as many as the server takes in one request (64)."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": EXAMPLE})

    texts: Annotated[
        list[Any],
        Field(
            description="Texts of up to 32 KiB each. A number is taken as its digits.",
            json_schema_extra={"items": TEXT_SCHEMA},
        ),
    ]
    # The server checks its range.
    top_k: Annotated[StrictInt | None, Field(description=TOP_K, json_schema_extra={"minimum": 1})] = None
    decisions: Annotated[StrictBool, Field(description=DECISIONS)] = False
    attributes: Annotated[StrictBool, Field(description=ATTRIBUTES)] = False


class AttributeValue(BaseModel):
    """What a further head of the model says of a text."""

    value: str
    confidence: float


class Answer(BaseModel):
    """The fields of `aisle.client.Prediction`: the categories of one text, best first, and their probabilities.

    The probabilities of a multi-label model do not sum to 1.
    """

    categories: list[str]
    confidences: list[float]
    version: Annotated[int, Field(description="The version of the model that answered.")]
    unknown: Annotated[float, Field(description="Share of the text's tokens that the model does not know.")]
    # Not in the answer unless they were asked for.
    attributes: Annotated[dict[str, AttributeValue] | None, Field(description="By name, such as the brand.")] = None


class Decided(Answer):
    """An answer with its decision."""

    decision: Annotated[str, Field(description="accept, review or unknown.")]
    decided: Annotated[
        str, Field(description="The accepted category; its parent if only that is sure; otherwise empty.")
    ]
    prediction_set: Annotated[list[str], Field(description="Categories, one of which is correct at the fitted rate.")]
    energy: Annotated[float, Field(description="The higher, the less the text resembles those of known categories.")]


def answer_of(prediction: Prediction) -> dict[str, Any]:
    """Return the fields of `Answer`, or those of `Decided` if decisions were asked for."""
    fields = ANSWER if prediction.decision is None else DECIDED
    answer = {name: getattr(prediction, name) for name in fields if name != "attributes"}
    if prediction.attributes is not None:
        answer["attributes"] = {name: each._asdict() for name, each in prediction.attributes.items()}
    return answer


ANSWER, DECIDED = tuple(Answer.model_fields), tuple(Decided.model_fields)


class ClassifyResponse(BaseModel):
    """One answer for each text, in the same order."""

    predictions: list[Decided | Answer]


class Health(BaseModel):
    """The server answers."""

    status: str
    version: Annotated[int | None, Field(description="The version of the model; null if the queue is full.")] = None


class ErrorBody(BaseModel):
    """What was wrong. `row` counts from 0 and is there only if one text is at fault."""

    error: str
    error_type: str
    row: int | None = None


def checked(kind: type[Body], value: Any) -> Body:
    """Return a body as its model.

    Raises:
        Fault: 422, naming the first field that is wrong.
    """
    if not isinstance(value, dict):
        raise Fault(422, "the body must be a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "extra_forbidden":
            raise Fault(422, f"unknown field; known are: {', '.join(kind.model_fields)}") from None
        where = ".".join(map(str, first["loc"]))
        raise Fault(422, f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
