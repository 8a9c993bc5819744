"""Ask the server, however long it takes: refused requests are sent again, with the partitions paused meanwhile."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

from aisle.client import Classifier, ClassifierError, Failure, InvalidText, Prediction
from aisle.console import say
from aisle.deploy.stream.figures import Figures
from aisle.deploy.stream.transport import Transport

POLL_EACH = 64  # answers
LONGEST_BACKOFF = 8.0  # seconds
TRIES = 4  # of a request that fails with an error of the server's own, before its texts are sent one by one
ALONE = 64  # texts that are then sent one by one: as many as a request has
OWN_ERRORS = {"INTERNAL", "UNKNOWN"}  # one text may be the cause, such as one for which the engine gives no number
NOT_ALLOWED = {"UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED"}  # waiting does not help
Answer = Prediction | Failure


class Asker:
    """Classifies batches, with decisions if the model has them. It never gives up, unless a stop is asked for."""

    def __init__(self, classifier: Classifier, transport: Transport, figures: Figures, stopping: threading.Event):
        """Prepare for the versions that answer now.

        Args:
            classifier: one without retries of its own, because it must tell each refusal.

        Raises:
            ClassifierError: no server answers.
        """
        self._classifier, self._transport = classifier, transport
        self._figures, self._stopping = figures, stopping
        self._versions: dict[int, bool] = {}  # those that have answered, and whether they give sets of categories
        self._decisions = classifier.models().has_decisions
        self._paused = False

    def gives_sets(self, version: int) -> bool:
        """Return whether a version that has answered is a multi-label model."""
        return self._versions[version]

    def ask(self, texts: Sequence[Any]) -> list[Answer]:
        """Return an answer to each text, in order; fewer only after a stop.

        Raises:
            InvalidText: the server refuses the request, whatever its texts.
            ClassifierError: the server does not allow requests.
        """
        answers: list[Answer] = []
        failures = alone = 0  # failures since the last answer; texts that are still sent one by one
        while len(answers) < len(texts) and not self._stopping.is_set():
            before = len(answers)
            rest = texts[before : before + 1] if alone else texts[before:]
            try:
                self._ask(rest, answers)
            except ClassifierError as error:
                failures = failures + 1 if len(answers) == before else 1
                own = error.status in OWN_ERRORS
                if alone and own and self._is_well():
                    answers.append(Failure(str(error)))
                elif failures >= TRIES and own:
                    alone = ALONE
                else:
                    self._wait(error, failures)
            else:
                failures = 0
            alone = max(0, alone - (len(answers) - before))
        return answers

    def _ask(self, texts: Sequence[Any], answers: list[Answer]) -> None:
        """Append the answers to texts, as many as come before the first error."""
        try:
            for answer in self._classifier.stream(texts, decisions=self._decisions):
                answers.append(answer)
                self._note(answer)
                if len(answers) % POLL_EACH == 0:
                    self._transport.poll()
        except InvalidText:
            before, self._decisions = self._decisions, self._classifier.models().has_decisions
            if before == self._decisions:
                raise

    def _note(self, answer: Answer) -> None:
        """End a pause; ask of a version that is new what it gives. Decisions are asked for from the next request on."""
        if self._paused:
            self._paused = False
            self._figures.paused(False)
            say("the server answers again")
        if isinstance(answer, Prediction) and answer.version not in self._versions:
            models = self._classifier.models()
            self._decisions = models.has_decisions
            self._versions[answer.version] = models.multi_label

    def _is_well(self) -> bool:
        """Return whether the server classifies another text."""
        try:
            self._classifier.probe(bulk=True)
        except ClassifierError:
            return False
        return True

    def _wait(self, error: ClassifierError, failures: int) -> None:
        """Pause the partitions: exponential backoff with full jitter, or as long as the server asks."""
        if error.status in NOT_ALLOWED:
            raise error
        self._figures.refusal(error.status or "UNKNOWN")
        if not self._paused:
            self._paused = True
            self._figures.paused(True)
            say(f"{error}; the partitions are paused until the server answers")
        self._transport.pause(error.wait + random.uniform(0, min(LONGEST_BACKOFF, 0.1 * 2 ** min(failures, 10))))
