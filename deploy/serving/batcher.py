"""A bounded two-priority queue with token-budget batching. Interactive requests run before bulk ones.

Triton has its own dynamic batching and queue policies. But with any queue policy its batcher never gives a busy model
the next request in advance (triton-inference-server/core#237), and Triton 2.51 notices late that the model is idle
again: requests wait for the next arrival, or half a second. So the model takes requests from Triton as they arrive and
queues them here.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
Logits = npt.NDArray[np.float32]
INLINE_TOKENS = 128  # interactive requests with at most this many tokens run inline; that takes no longer than a batch
SIZES = 32  # more bits than any number of tokens in a batch has
INLINE_SECONDS = 0.003  # requests that the engine computes in this time run inline, with any number of tokens


def is_bulk(parameters: str) -> bool:
    """Return whether a request's parameters, as JSON, set `bulk` to true."""
    return '"bulk"' in parameters and json.loads(parameters).get("bulk") is True


@dataclass(eq=False)  # compared by identity
class QueuedRequest:
    """A request: the concatenated token ids of its texts, and the logits computed so far."""

    request: Any
    tokens: Ints  # [sum of lengths]
    lengths: Ints  # [texts]
    bulk: bool  # runs only when no interactive request waits
    timeout: float = math.inf  # seconds after its arrival for which its caller waits
    arrived: float = field(default_factory=time.perf_counter)
    queue_time: float = 0.0  # seconds from its arrival until a batch took its first texts
    taken: int = 0  # number of texts that batches have taken so far
    logits: dict[int, Logits] = field(default_factory=dict)  # parts of the answer, by the index of their first text
    failed: bool = False

    @property
    def age(self) -> float:
        """Seconds since the request arrived."""
        return time.perf_counter() - self.arrived


@dataclass(frozen=True)
class Piece:
    """The texts from `start` to `stop` (exclusive) of a request."""

    owner: QueuedRequest
    start: int
    stop: int

    @property
    def tokens(self) -> Ints:
        if self.start == 0 and self.stop == len(self.owner.lengths):
            return self.owner.tokens
        ends = np.concatenate(([0], np.cumsum(self.owner.lengths)))
        return self.owner.tokens[ends[self.start] : ends[self.stop]]

    @property
    def lengths(self) -> Ints:
        return self.owner.lengths[self.start : self.stop]


Answer = tuple[QueuedRequest, Logits | Exception]  # logits [texts, labels], or the error


class Batcher:
    """An interactive and a bulk queue, and threads that run the engine on batches from them."""

    def __init__(
        self,
        compute: Callable[[Ints, Ints], Logits],
        answer: Callable[[Sequence[Answer]], None],
        abandoned: Callable[[QueuedRequest], bool],
        *,
        tokens: int,
        bulk_tokens: int,
        texts: int,
        max_queue_size: int,
        inline_seconds: float = INLINE_SECONDS,
        concurrency: int = 1,
    ) -> None:
        """Start the threads.

        Args:
            compute: the engine. Returns logits [texts, labels] for concatenated token ids and the lengths of the texts.
            answer: is called with the requests that a batch completed. The next batch starts after it returns.
            abandoned: returns whether the caller of a request no longer waits. Such a request is not computed, but
                answered with TimeoutError.
            tokens: largest number of tokens in a batch. A single longer text forms its own batch.
            bulk_tokens: the same for a bulk batch. An interactive request that arrives meanwhile waits for it.
            texts: largest number of texts in a batch.
            max_queue_size: number of requests that may wait in each of the two queues.
            inline_seconds: the engine time that `try_run_inline` may take.
            concurrency: number of batches in flight. With two, the engine computes one batch while the other is
                prepared or answered.
        """
        self._compute, self._deliver, self._abandoned = compute, answer, abandoned
        self._tokens, self._bulk_tokens, self._texts, self._max_queue_size = tokens, bulk_tokens, texts, max_queue_size
        self._interactive: deque[QueuedRequest] = deque()
        self._bulk: deque[QueuedRequest] = deque()
        self._changed = threading.Condition()
        self._engine = threading.BoundedSemaphore(concurrency)  # held while the engine computes
        self._inline_seconds = inline_seconds
        self._overlaps = concurrency > 1
        self._seconds = [math.inf] * SIZES  # moving average of the engine's time, by the bits of the number of tokens
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"batcher {number}", daemon=True) for number in range(concurrency)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, request: QueuedRequest) -> bool:
        """Add a request to its queue; return False if the queue is full."""
        queue = self._bulk if request.bulk else self._interactive
        with self._changed:
            if len(queue) >= self._max_queue_size:
                return False
            queue.append(request)
            self._changed.notify()
        return True

    def try_run_inline(self, group: Sequence[QueuedRequest]) -> Logits | None:
        """Run the engine in this thread on requests that arrived together, if no request waits and the engine is idle.

        This saves waking another thread, and all requests are answered together. Returns None if they must be queued:
        they are too large, other requests wait, or a caller no longer waits.

        Raises:
            Exception: any exception of the engine.
        """
        if not group or not self._fits_inline(group):
            return None
        with self._changed:  # `abandoned` is always called with this lock held
            busy = self._interactive or self._bulk or any(map(self._abandoned, group))
            if busy or not self._engine.acquire(blocking=False):
                return None
        try:
            tokens = np.concatenate([each.tokens for each in group])
            return self._run(tokens, np.concatenate([each.lengths for each in group]))
        finally:
            self._engine.release()

    def _fits_inline(self, group: Sequence[QueuedRequest]) -> bool:
        """Return whether the engine is fast enough on these requests that others, arriving meanwhile, hardly wait."""
        tokens, texts = sum(len(each.tokens) for each in group), sum(len(each.lengths) for each in group)
        bulk = any(each.bulk for each in group)
        if bulk and self._overlaps:
            return False  # in the queue, requests of a file form larger batches
        if self._estimate(tokens) <= self._inline_seconds:
            return tokens <= self._tokens and texts <= self._texts
        return tokens <= INLINE_TOKENS and not bulk

    def _estimate(self, tokens: int) -> float:
        """Return the engine's seconds for a batch, as an upper bound: they grow at most in proportion to the tokens."""
        size = tokens.bit_length()
        return min(each * 2.0 ** max(0, size - known) for known, each in enumerate(self._seconds))

    def close(self) -> None:
        """Compute all queued requests, then end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while pieces := self._next():
            try:
                tokens = np.concatenate([piece.tokens for piece in pieces])
                lengths = np.concatenate([piece.lengths for piece in pieces])
                with self._engine:
                    logits = self._run(tokens, lengths)
            except Exception as error:  # any exception of a runtime fails only these requests
                self._fail([piece.owner for piece in pieces], error)
                continue
            self._answer(self._finished(pieces, logits))

    def _finished(self, pieces: Sequence[Piece], logits: Logits) -> list[Answer]:
        """Store the logits of pieces and return the completed requests. Pieces of a request may finish in any order."""
        ends = np.cumsum([len(piece.lengths) for piece in pieces])
        finished: list[Answer] = []
        with self._changed:
            for piece, own in zip(pieces, np.split(logits, ends[:-1]), strict=True):
                found = piece.owner.logits
                found[piece.start] = own
                if not piece.owner.failed and sum(map(len, found.values())) == len(piece.owner.lengths):
                    finished.append((piece.owner, np.concatenate([found[start] for start in sorted(found)])))
        return finished

    def _run(self, tokens: Ints, lengths: Ints) -> Logits:
        start = time.perf_counter()
        logits = self._compute(tokens, lengths)
        seconds, size = time.perf_counter() - start, len(tokens).bit_length()
        average = self._seconds[size]
        self._seconds[size] = seconds if average == math.inf else 0.9 * average + 0.1 * seconds
        return logits

    def _next(self) -> list[Piece]:
        """Return the next batch, of interactive requests first. After `close` and the last request it is empty."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._interactive or self._bulk or self._closed)
                queue = self._interactive or self._bulk
                if not queue:
                    return []
                pieces, abandoned = self._take(queue)
                if self._interactive or self._bulk:
                    self._changed.notify()  # another thread may compute the rest
            self._answer([(request, TimeoutError()) for request in abandoned])
            if pieces:
                return pieces

    def _take(self, queue: deque[QueuedRequest]) -> tuple[list[Piece], list[QueuedRequest]]:
        """Take texts in order of arrival until the batch is full. Return them and the abandoned requests."""
        pieces: list[Piece] = []
        abandoned: list[QueuedRequest] = []
        tokens_left = self._tokens if queue is self._interactive else self._bulk_tokens
        texts_left = self._texts
        while queue and tokens_left > 0 and texts_left:
            first = queue[0]
            if not first.taken and self._abandoned(first):
                abandoned.append(queue.popleft())
                continue
            if not first.taken:
                first.queue_time = first.age
            start, total = first.taken, np.cumsum(first.lengths[first.taken : first.taken + texts_left])
            fitting = int(np.searchsorted(total, tokens_left, side="right"))
            if not fitting:
                if pieces:
                    break
                fitting = 1
            first.taken += fitting
            tokens_left -= int(total[fitting - 1])
            texts_left -= fitting
            pieces.append(Piece(first, start, first.taken))
            if first.taken < len(first.lengths):
                break
            queue.popleft()
        return pieces, abandoned

    def _answer(self, answers: Sequence[Answer]) -> None:
        if answers:
            with contextlib.suppress(Exception):  # an answer that cannot be delivered must not end the thread
                self._deliver(answers)

    def _fail(self, failed: list[QueuedRequest], error: Exception) -> None:
        with self._changed:
            for queue in (self._interactive, self._bulk):
                if queue and queue[0] in failed:  # the rest of a request that was split
                    queue.popleft()
            newly_failed = [request for request in failed if not request.failed]  # another piece may have failed before
            for request in newly_failed:
                request.failed = True
        self._answer([(request, error) for request in newly_failed])
