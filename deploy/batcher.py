"""What waits for the engine: so much and no more, calls before files, and in batches by their tokens.

Triton forms batches of requests, and bounds its queues by policies. But any policy makes its batcher hand out nothing
ahead (triton-inference-server/core#237) and then, in 2.51, not notice that the model is free again: what waits stays
until another request comes, half a second at most. So requests are taken from Triton as they come, and wait here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
Logits = npt.NDArray[np.float32]
AT_ONCE = 128  # tokens: what comes meanwhile waits no longer than for a batch


@dataclass(eq=False)  # each is itself alone
class Waiting:
    """A request: its texts end to end, and what is known of them so far."""

    request: Any
    tokens: Ints  # [sum of lengths]
    lengths: Ints  # [texts]
    patient: bool  # of a file: computed when no call waits
    since: float = field(default_factory=time.perf_counter)
    waited: float = 0.0  # seconds, until its first texts were in a batch
    taken: int = 0  # texts that are in a batch, or were
    logits: list[Logits] = field(default_factory=list)

    @property
    def age(self) -> float:
        """Seconds since it came."""
        return time.perf_counter() - self.since


@dataclass(frozen=True)
class Piece:
    """Texts `start` to `stop` of a request."""

    waiting: Waiting
    start: int
    stop: int

    @property
    def tokens(self) -> Ints:
        ends = np.concatenate(([0], np.cumsum(self.waiting.lengths)))
        return self.waiting.tokens[ends[self.start] : ends[self.stop]]

    @property
    def lengths(self) -> Ints:
        return self.waiting.lengths[self.start : self.stop]


class Batcher:
    """Two queues, of calls and of files, and a thread that computes what waits in them."""

    def __init__(
        self,
        compute: Callable[[Ints, Ints], Logits],
        answer: Callable[[Waiting, Logits | Exception], None],
        gone: Callable[[Waiting], bool],
        *,
        tokens: int,
        tokens_of_files: int,
        texts: int,
        longest_queue: int,
    ) -> None:
        """Start the thread.

        Args:
            compute: the engine: logits [texts, labels] of texts end to end and their lengths.
            answer: is given the logits of a request, all at once, or what went wrong.
            gone: tells, before its turn, whether nobody waits for a request any more; it is answered by TimeoutError.
            tokens: of a batch at most; one text may be longer.
            tokens_of_files: the same of a batch of files, for which a call that comes meanwhile waits.
            texts: of a batch at most.
            longest_queue: requests that may wait in each of the queues.
        """
        self._compute, self._tell, self._gone = compute, answer, gone
        self._tokens, self._tokens_of_files, self._texts, self._longest = tokens, tokens_of_files, texts, longest_queue
        self._calls: deque[Waiting] = deque()
        self._files: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._engine = threading.Lock()  # held while the engine computes
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def put(self, waiting: Waiting) -> bool:
        """Add a request to its queue; False where that is full."""
        queue = self._files if waiting.patient else self._calls
        with self._changed:
            if len(queue) >= self._longest:
                return False
            queue.append(waiting)
            self._changed.notify()
        return True

    def at_once(self, waiting: Waiting) -> Logits | None:
        """Compute a small call here and now if nothing waits and the engine is idle: no thread need wake up for it.

        Raises:
            Exception: whatever the engine does.
        """
        if waiting.patient or len(waiting.tokens) > AT_ONCE:
            return None
        with self._changed:  # the thread asks, too, who is gone
            if self._calls or self._files or self._gone(waiting) or not self._engine.acquire(blocking=False):
                return None
        try:
            return self._compute(waiting.tokens, waiting.lengths)
        finally:
            self._engine.release()

    def close(self) -> None:
        """Compute what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while pieces := self._next():
            try:
                tokens = np.concatenate([piece.tokens for piece in pieces])
                lengths = np.concatenate([piece.lengths for piece in pieces])
                with self._engine:
                    logits = self._compute(tokens, lengths)
            except Exception as error:  # whatever a runtime raises: these requests fail, the next are computed
                self._fail([piece.waiting for piece in pieces], error)
                continue
            ends = np.cumsum([len(piece.lengths) for piece in pieces])
            for piece, own in zip(pieces, np.split(logits, ends[:-1]), strict=True):
                piece.waiting.logits.append(own)
                if piece.stop == len(piece.waiting.lengths):
                    self._answer(piece.waiting, np.concatenate(piece.waiting.logits))

    def _next(self) -> list[Piece]:
        """Return the next batch, of calls if there are any; an empty one at the end of all."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._files or self._closed)
                queue = self._calls or self._files
                if not queue:
                    return []
                pieces, late = self._take(queue)
            for waiting in late:
                self._answer(waiting, TimeoutError())
            if pieces:
                return pieces

    def _take(self, queue: deque[Waiting]) -> tuple[list[Piece], list[Waiting]]:
        """Take texts in order of arrival until the batch is full, and those that nobody waits for."""
        pieces: list[Piece] = []
        late: list[Waiting] = []
        room, places = self._tokens if queue is self._calls else self._tokens_of_files, self._texts
        while queue and room > 0 and places:
            first = queue[0]
            if not first.taken and self._gone(first):
                late.append(queue.popleft())
                continue
            if not first.taken:
                first.waited = first.age
            start, total = first.taken, np.cumsum(first.lengths[first.taken : first.taken + places])
            fitting = int(np.searchsorted(total, room, side="right"))
            if not fitting:
                if pieces:
                    break
                fitting = 1
            first.taken += fitting
            room, places = room - int(total[fitting - 1]), places - fitting
            pieces.append(Piece(first, start, first.taken))
            if first.taken < len(first.lengths):
                break
            queue.popleft()
        return pieces, late

    def _answer(self, waiting: Waiting, found: Logits | Exception) -> None:
        with contextlib.suppress(Exception):  # one that cannot be answered must not end the thread for all others
            self._tell(waiting, found)

    def _fail(self, failed: list[Waiting], error: Exception) -> None:
        with self._changed:
            for queue in (self._calls, self._files):
                if queue and queue[0] in failed:  # the rest of one that was divided
                    queue.popleft()
        for waiting in failed:
            self._answer(waiting, error)
