"""The loop of `aisle stream`: take messages, classify their texts, and write the answers in one transaction."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aisle.client import Failure, Prediction
from aisle.deploy.stream.asking import Answer, Asker
from aisle.deploy.stream.formats import Reader
from aisle.deploy.stream.paths import TextPath
from aisle.deploy.stream.transport import CLASSIFIED, DEAD_LETTER, PASSED_ON, REASON, Message, Output, Transport

MOST = 1024  # messages of a transaction: 16 requests


@dataclass(frozen=True)
class Route:
    """Where the text is in a message, and where answers go."""

    reader: Reader
    paths: Sequence[TextPath]
    target: str
    dead_letters: str


def run(transport: Transport, asker: Asker, route: Route, stopping: threading.Event) -> Iterator[Output]:
    """Yield each output after it is committed, until a stop is asked for.

    Raises:
        InputError, ServerError: waiting does not help; the message says what to do.
    """
    while not stopping.is_set():
        messages = transport.take(MOST)
        read = [route.reader(route.paths, message.value) for message in messages]
        texts = [each for each in read if _is_text(each)]
        answers = asker.ask(texts)
        if len(answers) < len(texts):  # stopped; the next start reads these messages again
            return
        yield from transport.commit([*outputs_of(messages, read, answers, route, asker)])


def _is_text(read: Any) -> bool:
    return read is not None and not isinstance(read, Failure)


def outputs_of(
    messages: Sequence[Message], read: Sequence[Any], answers: Sequence[Answer], route: Route, asker: Asker
) -> Iterator[Output]:
    """Yield the output of each message, in order."""
    left = iter(answers)
    for message, each in zip(messages, read, strict=True):
        answer = next(left) if _is_text(each) else each
        if isinstance(answer, Prediction):
            yield Output(
                message,
                route.target,
                _value(answer, asker.gives_sets(answer.version)),
                CLASSIFIED,
                version=answer.version,
            )
        elif isinstance(answer, Failure):
            reason = (REASON, answer.message.encode())
            yield Output(message, route.dead_letters, message.value, DEAD_LETTER, (reason,))
        else:
            yield Output(message, route.target, message.value, PASSED_ON)


def _value(answer: Prediction, is_set: bool) -> bytes:
    value: dict[str, Any] = {"category": answer.category, "confidence": answer.confidence}
    if is_set:
        value = {"categories": answer.categories, "confidences": answer.confidences}
    if answer.decision is not None:
        value |= {"decision": answer.decision, "decided": answer.decided or None}
    return json.dumps({**value, "version": answer.version}, ensure_ascii=False).encode()
