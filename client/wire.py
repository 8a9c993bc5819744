"""Encode and decode `ModelInfer` messages directly; only embeddings become NumPy arrays."""

from __future__ import annotations

import json
import operator
import re
import struct
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

from aisle.client.protocol import (
    ATTRIBUTES_MODEL,
    DECISIONS_MODEL,
    EMBEDDINGS_MODEL,
    MISSING,
    MODEL,
    Attribute,
    ClassifierError,
    Embedding,
    Failure,
    InvalidText,
    Prediction,
)
from aisle.client.status import EmptyAnswer
from aisle.errors import InputError
from aisle.preprocess.clean import check_size
from aisle.preprocess.fields import PARAMETER, join, to_json
from aisle.preprocess.values import TextError, as_text

INFER = "/inference.GRPCInferenceService/ModelInfer"
CONFIG = "/inference.GRPCInferenceService/ModelConfig"
Request: TypeAlias = Any  # service_pb2.ModelInferRequest, which has no types
SHORT = 200  # bytes; only shorter answers can lack outputs
_SIZE = struct.Struct("<I")  # the length of a string, before its bytes
_ABOUT_REQUEST = ("top_k", "size", "this version has no")  # starts of refusals that are not about a text
NO_DECISIONS = "this version has no decisions; ask for its attributes alone, or fit decisions with aisle decide"
_ROW = re.compile(r"row (\d+): ")


class Models(NamedTuple):
    """The versions that answer."""

    fingerprints: dict[int, str]  # of the model behind each version
    has_decisions: bool  # whether all of them have decisions
    fields: tuple[str, ...] | None = ()  # that all of them read; empty if they read one text, None if they differ
    multi_label: bool = False  # whether one of them gives a text several categories
    attributes: tuple[str, ...] = ()  # of any of them


class Fields(bytes):
    """The fields of a product, such as title and brand, as a JSON object in UTF-8."""


class Wanted(NamedTuple):
    """What a caller wants to know about each text."""

    top_k: int | None = None  # None: what the model itself answers
    decisions: bool = False
    embedding: bool = False  # instead of categories
    size: int | None = None  # numbers of an embedding; None: all that the model gives
    attributes: bool = False

    @property
    def model(self) -> str:
        """The model of the server that gives it."""
        if self.embedding:
            return EMBEDDINGS_MODEL
        if self.attributes:
            return ATTRIBUTES_MODEL
        return DECISIONS_MODEL if self.decisions else MODEL


def wanted_categories(top_k: int | None, decisions: bool, attributes: bool = False) -> Wanted:
    """Return the wish for categories.

    Raises:
        TypeError: `decisions` or `attributes` is neither true nor false, such as "no", which Python takes for true.
    """
    for name, value in (("decisions", decisions), ("attributes", attributes)):
        if value not in (True, False):
            raise TypeError(f"{name} must be True or False; got {value!r}")
    return Wanted(top_k, bool(decisions), attributes=bool(attributes))


def wanted_embedding(size: int | None) -> Wanted:
    """Return the wish for embeddings, shortened to `size` numbers if it is given.

    Raises:
        ValueError: `size` is not a positive whole number.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"size must be a positive whole number, not {size!r}")
    return Wanted(embedding=True, size=size)


def check_list(texts: object) -> None:
    """Refuse arguments that are not lists of texts, such as a single string.

    Raises:
        TypeError: `texts` is one text, a table, or not iterable.
    """
    if isinstance(texts, str | bytes | bytearray):
        raise TypeError("texts must be a list of texts; for one text write [text]")
    if isinstance(texts, Mapping | Set) or hasattr(texts, "columns"):
        raise TypeError(
            f"texts must be a list of texts, in order; got {type(texts).__name__}: pass its column or values"
        )
    if not isinstance(texts, Iterable) and not hasattr(texts, "__aiter__") and not hasattr(texts, "__getitem__"):
        raise TypeError(f"texts must be a list of texts; got {type(texts).__name__}")


def to_utf8(text: Any) -> bytes:
    """Return a text as UTF-8.

    Raises:
        InvalidText: it is missing, not a text (see `aisle.preprocess.values`), or not Unicode.
    """
    try:
        if isinstance(text, Mapping):
            return Fields(to_json(text))
        known = text if type(text) is str else as_text(text)
        if known is None:
            raise InvalidText(MISSING.message)
        return known.encode() if isinstance(known, str) else known
    except UnicodeEncodeError:
        raise InvalidText("text is not valid Unicode: it holds lone surrogates; remove them") from None
    except TextError as error:
        raise InvalidText(str(error)) from None


def to_utf8_list(texts: Sequence[Any]) -> list[bytes]:
    """Return texts as UTF-8.

    Raises:
        InvalidText: a text is bad; if there are several texts, the message names the first bad row.
    """
    raw: list[bytes] = []
    try:
        for text in texts:
            raw.append(to_utf8(text))
    except InvalidText as error:
        raise (with_row(error, len(raw)) if len(texts) > 1 else error) from None
    return raw


def plain(raw: Sequence[bytes]) -> list[str | bytes]:
    """Return texts as the model reads them, for a log: fields are joined, in the caller's order."""
    return [join(json.loads(data)) or "" if isinstance(data, Fields) else data for data in raw]


def check_texts(texts: Sequence[Any]) -> tuple[list[Failure | None], list[bytes]]:
    """Return a `Failure` for each bad text and None for each other one, and the texts to send, as UTF-8.

    A text that is too long is not sent, because a gateway might refuse the whole message.
    """
    failures: list[Failure | None] = []
    good: list[bytes] = []
    for text in texts:
        try:
            raw = to_utf8(text)
            check_size(raw)
        except InputError as error:
            failures.append(Failure(str(error)))
        else:
            good.append(raw)
            failures.append(None)
    return failures, good


def failure(error: InvalidText) -> Failure:
    """Return the `Failure` of a text that the server refused.

    Raises:
        InvalidText: the request is at fault, such as its `top_k`, and not the text.
    """
    if str(error).startswith(_ABOUT_REQUEST):
        raise error
    return Failure(str(error))


def with_row(error: InvalidText, start: int) -> InvalidText:
    """Return the error with its row in the caller's list; `start` is the row of the request's first text."""
    message = str(error)
    if found := _ROW.match(message):
        row, message = start + int(found[1]), message[found.end() :]
    elif message.startswith("text "):  # the request's only text
        row = start
    else:
        return error
    return InvalidText(f"row {row}: {message}", row)


def located(error: InvalidText) -> InvalidText:
    """Return the error of a call's only request, with the row that its message names."""
    found = _ROW.match(str(error))
    return InvalidText(str(error), int(found[1])) if found else error


def check_top_k(top_k: Any) -> int | None:
    """Return `top_k` as an int, or None if it is not given.

    Raises:
        InvalidText: it is not a 32-bit whole number. The server checks the number of categories.
    """
    if top_k is None:
        return None
    try:
        number = None if isinstance(top_k, bool) else operator.index(top_k)
    except TypeError:
        number = None
    if number is None or not -(2**31) <= number < 2**31:
        raise InvalidText(f"top_k must be a whole number from 1 to the number of categories; got {top_k!r}")
    return number


def request_of(raw: Sequence[bytes], wanted: Wanted, version: str) -> Request:
    """Return the request: `text` BYTES [n, 1] and, if it is given, `top_k` INT32 [n, 1].

    Raises:
        InvalidText: `top_k` is not a 32-bit whole number.
    """
    top_k = check_top_k(wanted.top_k)
    request = service_pb2.ModelInferRequest(model_name=wanted.model, model_version=version)
    shape = (len(raw), 1)
    request.inputs.add(name="text", datatype="BYTES", shape=shape)
    request.raw_input_contents.append(b"".join([part for text in raw for part in (_SIZE.pack(len(text)), text)]))
    if any(isinstance(text, Fields) for text in raw):
        request.parameters[PARAMETER].bool_param = True
    if top_k is not None:
        request.inputs.add(name="top_k", datatype="INT32", shape=shape)
        request.raw_input_contents.append(struct.pack("<i", top_k) * len(raw))
    return request


def check_outputs(message: bytes) -> bytes:
    """Return an answer, after checking that it has outputs.

    Raises:
        EmptyAnswer: it has no outputs.
    """
    if len(message) < SHORT and not service_pb2.ModelInferResponse.FromString(message).outputs:
        raise EmptyAnswer
    return message


def embeddings(message: bytes, size: int | None) -> list[Embedding]:
    """Read `embedding` [n, size], and the version that answered.

    Args:
        size: how many numbers to keep of each vector, which then gets length 1 again; None keeps all.

    Raises:
        ClassifierError: the answer has another form.
        InvalidText: it has fewer numbers.
    """
    answer = service_pb2.ModelInferResponse.FromString(message)
    shapes = {output.name: output.shape for output in answer.outputs}
    try:
        rows = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(tuple(shapes["embedding"]))
    except (KeyError, ValueError, IndexError):
        message_of = f"the server's model {EMBEDDINGS_MODEL} is not from Aisle: it gave no embedding [n, size]"
        raise ClassifierError("", message_of) from None
    return [Embedding(row, int(answer.model_version or 0)) for row in (rows if size is None else shortened(rows, size))]


def shortened(rows: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    """Return the first `size` numbers of embeddings [n, numbers], each vector of length 1 again.

    Raises:
        InvalidText: the embeddings have fewer numbers.
    """
    if size > rows.shape[1]:
        raise InvalidText(f"size must be at most {rows.shape[1]}, the numbers of the model's embeddings; got {size}")
    kept = rows[:, :size]
    lengths = np.linalg.norm(kept, axis=1, keepdims=True)
    scaled: npt.NDArray[np.float32] = kept / np.maximum(lengths, np.finfo(np.float32).tiny)
    return scaled


def matrix(found: Sequence[Embedding]) -> npt.NDArray[np.float32]:
    """Return the vectors of embeddings, [texts, size].

    Raises:
        ClassifierError: several versions answered.
    """
    check_one_version({each.version for each in found})
    return np.stack([each.values for each in found]) if found else np.empty((0, 0), np.float32)


def check_one_version(versions: Set[int]) -> None:
    """Check that all embeddings come from the same version.

    Raises:
        ClassifierError: they do not.
    """
    if len(versions) > 1:
        named = ", ".join(map(str, sorted(versions)))
        raise ClassifierError("", f"versions {named} answered; their embeddings cannot be compared: embed again")


def predictions(message: bytes, wanted: Wanted) -> list[Prediction]:
    """Read `category` and `confidence`, both [n, k], `unknown` [n, 1], what else is wanted, and the version.

    Empty names fill up the rows of texts to which a multi-label model gives fewer categories.

    The version is that of the response or, during a canary, the value of the output `version`.

    Raises:
        ClassifierError: the answer has another form.
        InvalidText: the version has no decisions.
    """
    answer = service_pb2.ModelInferResponse.FromString(message)
    shapes = {output.name: output.shape for output in answer.outputs}
    raw = dict(zip(shapes, answer.raw_output_contents, strict=False))
    if wanted.decisions and raw.get("decision", b"").startswith(_SIZE.pack(0)):
        raise InvalidText(NO_DECISIONS)  # which the server does not refuse if attributes are asked for too
    try:
        rows, k = shapes["category"]
        names = _strings(raw["category"])
        values = struct.unpack(f"<{rows * k}f", raw["confidence"])
        shares = struct.unpack(f"<{rows}f", raw["unknown"]) if "unknown" in raw else (0.0,) * rows
        version = struct.unpack_from("<i", raw["version"])[0] if "version" in raw else int(answer.model_version or 0)
        starts = range(0, rows * k, k)
        found = [
            Prediction(*_given(names[i : i + k], values[i : i + k]), version, share)
            for i, share in zip(starts, shares, strict=True)
        ]
        if wanted.decisions:
            found = _with_decisions(found, raw, shapes["prediction_set"][1])
        return _with_attributes(found, raw, shapes["attribute"][1]) if wanted.attributes else found
    except (KeyError, ValueError, struct.error):
        raise ClassifierError("", f"the server's model {MODEL} is not from Aisle: it gave no category [n, k]") from None


def _given(names: list[str], confidences: tuple[float, ...]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return the categories of a text and their confidences, without those that only fill up its row."""
    if names[-1]:
        return tuple(names), confidences
    count = names.index("")
    return tuple(names[:count]), confidences[:count]


def _with_decisions(found: list[Prediction], raw: Mapping[str, bytes], width: int) -> list[Prediction]:
    """Add `decision`, `decided` and `energy` [n, 1], and `prediction_set` [n, width], which "" fills up."""
    members = _strings(raw["prediction_set"])
    energies = struct.unpack(f"<{len(found)}f", raw["energy"])
    decisions = zip(found, _strings(raw["decision"]), _strings(raw["decided"]), energies, strict=True)
    return [
        replace(
            prediction,
            decision=decision,
            decided=decided,
            prediction_set=tuple(name for name in members[i * width : (i + 1) * width] if name),
            energy=energy,
        )
        for i, (prediction, decision, decided, energy) in enumerate(decisions)
    ]


def _with_attributes(found: list[Prediction], raw: Mapping[str, bytes], heads: int) -> list[Prediction]:
    """Add `attribute`, `attribute_value` and `attribute_confidence`, each [n, heads]."""
    names, values = _strings(raw["attribute"]), _strings(raw["attribute_value"])
    pairs = map(Attribute, values, struct.unpack(f"<{len(found) * heads}f", raw["attribute_confidence"]))
    named = list(zip(names, pairs, strict=True))
    return [
        replace(prediction, attributes=dict(named[i * heads : (i + 1) * heads])) for i, prediction in enumerate(found)
    ]


def _strings(raw: bytes) -> list[str]:
    found, place, end = [], 0, len(raw)
    while place < end:
        start = place + 4
        place = start + int.from_bytes(raw[place:start], "little")
        found.append(raw[start:place].decode())
    return found


def max_batch(message: bytes) -> int:
    """Read how many texts the server takes in one request from the answer to `config_request`."""
    return max(1, int(service_pb2.ModelConfigResponse.FromString(message).config.max_batch_size))


def models(message: bytes) -> Models:
    """Read which versions answer from the answer to `config_request`."""
    found, fields = _by_version(message, "fingerprint"), _by_version(message, "fields")
    read = {tuple(json.loads(fields.get(version, "[]"))) for version in found}
    decide = bool(found) and found.keys() == _by_version(message, "decisions").keys()
    multi_label = bool(_by_version(message, "multi_label"))
    attributes = dict.fromkeys(
        name for names in _by_version(message, "attributes").values() for name in json.loads(names)
    )
    return Models(found, decide, next(iter(read), ()) if len(read) < 2 else None, multi_label, tuple(attributes))


def category_counts(message: bytes) -> dict[int, int]:
    """Read how many categories each version has from the answer to `config_request`."""
    return {version: int(count) for version, count in _by_version(message, "categories").items()}


def _by_version(message: bytes, name: str) -> dict[int, str]:
    """Return the model's parameters `NAME_VERSION`, by version."""
    parameters = service_pb2.ModelConfigResponse.FromString(message).config.parameters
    found = ((re.fullmatch(rf"{name}_(\d+)", key), value.string_value) for key, value in parameters.items())
    return {int(match[1]): value for match, value in found if match}


def config_request(version: str) -> bytes:
    """Return the request for the model's configuration."""
    request = service_pb2.ModelConfigRequest(name=MODEL, version=version)
    return bytes(request.SerializeToString())
