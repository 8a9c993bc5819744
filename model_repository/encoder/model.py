"""Triton's `encoder`: maps `input_ids` [n, longest], `lengths` [n, 1], `top_k` to `category`, `confidence` [n, k].

And to decisions, attributes or embeddings, for requests that name their outputs.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from aisle.build.engine import load_engine
from aisle.build.repository import gate_state, read_report
from aisle.deploy.serving import attributes
from aisle.deploy.serving.answers import Labels, pairs_of
from aisle.deploy.serving.attributes import Attributes
from aisle.deploy.serving.batcher import Answer, Batcher, QueuedRequest, is_bulk
from aisle.deploy.serving.cache import DECIDED, PLAIN, REACHED, AnswerCache, Kind, keys_of, read_rows, rows_of
from aisle.deploy.serving.deadlines import CallerClocks
from aisle.deploy.serving.decider import MISSING, OUTPUTS, Decider, Tensors, count_outcomes, no_decisions
from aisle.deploy.serving.lost_gpu import end_if_lost
from aisle.deploy.serving.metrics import Metrics
from aisle.deploy.serving.ranking import ALL_REACHED, MultiLabelRanking, reached_pairs, read_reached
from aisle.deploy.serving.senders import Senders
from aisle.errors import InputError
from aisle.train.core.decisions import Decisions

COUNTERS = (
    "tokens_useful",
    "tokens_computed",
    "engine_seconds",
    "engine_batches",
    "engine_failures",
    "queue_seconds",
    "queue_requests",
    "requests_refused",
    "texts_late",
    "cache_lookups",
    "cache_hits",
    "cache_evictions",
    "confidence_sum",
    "confidence_count",
)
NOT_FINITE = "the engine gives no finite logits for a text; roll back to the previous version, and train or build again"
NO_EMBEDDINGS = "this version has no embeddings; build it again from its checkpoint"
BAD_TOKENS = "input_ids and lengths must come from the tokenizer; send texts to product_classifier"


@dataclass(frozen=True)
class Call:
    """A request and its decoded inputs."""

    request: Any
    top_k: int  # of a multi-label version, it may be `ALL_REACHED`
    unknown: Any  # [texts, 1] or None
    with_logits: bool
    with_embeddings: bool
    with_decisions: bool
    with_attributes: bool
    keys: list[bytes]  # cache keys of its texts; empty if the cache is off and no decisions are wanted
    known: dict[bytes, bytes]  # the keys that are in the cache, with their entries
    missing: list[bytes]  # the other keys, without repetition: the engine computes these texts

    @property
    def kind(self) -> Kind:
        return kind_of(self.top_k, self.with_decisions)


@dataclass(frozen=True)
class Ranked:
    """The answer to a request."""

    request: Any
    category: Any  # [texts, k] of bytes
    confidence: Any  # [texts, k]
    unknown: Any  # [texts, 1], from the tokenizer; None if the request has none
    logits: Any  # [texts, labels]; None unless requested
    embedding: Any  # [texts, size], each of length 1; None unless requested
    further: Tensors  # decisions and attributes; empty unless requested


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"], args["model_version"])
        self.engine = load_engine(folder, args["model_instance_device_id"])
        spec = self.engine.spec
        self.attributes = Attributes.load(folder)
        self.categories = spec.labels - self.attributes.width
        self.labels = Labels.load(folder, self.categories)
        decisions = Decisions.load(folder, self.labels.names)
        self.decider = Decider(decisions, self.labels) if decisions else None
        self.multi_label = MultiLabelRanking.load(folder, self.labels)
        self.cache = AnswerCache.of_environment()
        counters = map(_counter, COUNTERS)
        self.metrics = Metrics(args["model_version"], args["model_instance_name"], *counters)
        self.callers = CallerClocks()
        gate = gate_state(read_report(Path(args["model_repository"]).parent, int(args["model_version"])))
        info = {"target": spec.target, "precision": spec.precision, "checkpoint": spec.checkpoint, "gate": gate}
        self.metrics.set_until_closed("aisle_model_info", **info)
        self.no_outputs = np.empty((0, spec.labels + spec.embedding), np.float32)
        config = json.loads(args["model_config"])
        self.outputs = {each["name"] for each in config["output"]}
        max_queue_size = int(config["parameters"]["max_queue_size"]["string_value"])
        max_tokens = self.engine.max_batch_tokens
        self.senders = Senders(self.send, max_queue_size)
        self.batcher = Batcher(
            self.compute,
            self.answer,
            self.abandoned,
            tokens=max_tokens,
            # On a CPU this costs 3 to 4 % of throughput and halves the wait of interactive requests.
            bulk_tokens=max_tokens // 2 if spec.target == "openvino" else max_tokens,
            texts=self.engine.max_texts,
            concurrency=self.engine.concurrency,
            max_queue_size=max_queue_size,
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run small requests inline and answer them together; queue the others for the batcher's threads.

        Small requests need no other thread. For the others, Triton passes on the next requests meanwhile.
        """
        responses: list[Any] = [None] * len(requests)
        group: list[tuple[int, QueuedRequest]] = []
        for number, request in enumerate(requests):
            try:
                group.append((number, self.read(request)))
            except InputError as error:
                responses[number] = refusal("INVALID_ARG", str(error))
        cached = [each for each in group if not len(each[1].lengths)]
        self.respond(responses, cached, [self.no_outputs] * len(cached))
        group = [each for each in group if len(each[1].lengths)]
        try:
            outputs = self.batcher.try_run_inline([each for _, each in group])
        except Exception as error:  # any exception of a runtime
            for number, _ in group:
                responses[number] = refusal("INTERNAL", f"the engine failed: {error}")
            return responses
        if outputs is not None:
            ends = np.cumsum([len(each.lengths) for _, each in group])
            self.respond(responses, group, np.split(outputs, ends[:-1]))
            return responses
        for number, each in group:
            if not self.batcher.put(each):
                self.metrics.add("aisle_requests_refused_total")
                responses[number] = refusal("UNAVAILABLE", "Exceeds maximum queue size")
        return responses

    def respond(self, responses: list[Any], group: Sequence[tuple[int, QueuedRequest]], outputs: Sequence[Any]) -> None:
        """Set the responses of requests, given as (number, request), from the engine's outputs."""
        if group:
            answers = self.ranked([each for _, each in group], outputs)
            for (number, _), answer in zip(group, answers, strict=True):
                responses[number] = response(answer)

    def read(self, request: Any) -> QueuedRequest:
        """Read a request.

        Raises:
            InputError: the engine cannot pack the token ids (a caller may have bypassed the tokenizer), or `top_k` is
                out of range.
        """
        tokens, lengths = unpadded(request)
        spec = self.engine.spec
        if not (
            lengths.min() >= 1
            and self.fits(lengths)
            and lengths.sum() == len(tokens)
            and tokens.min() >= 0
            and (not spec.vocabulary or tokens.max() < spec.vocabulary)
        ):
            raise InputError(BAD_TOKENS)
        top_ks, with_logits = optional(request, "top_k"), optional(request, "return_logits")
        parameters = request.parameters()
        wanted = with_logits is not None and bool(with_logits.any())
        named = self.named(request)
        embedded = asks_for(named, {"embedding"}, spec.embedding, NO_EMBEDDINGS)
        top_k = ALL_REACHED if self.multi_label and top_ks is None else self.labels.top_k(top_ks)
        unknown = optional(request, "unknown_tokens")
        attributed = asks_for(named, attributes.OUTPUTS, self.attributes, attributes.MISSING)
        # The ensemble of attributes has the decisions too; of a version without these they are empty.
        decided = asks_for(named, OUTPUTS, self.decider or attributed, MISSING) and bool(self.decider)
        found = self.look_up(tokens, lengths, top_k, wanted or embedded or attributed, kind_of(top_k, decided))
        call = Call(request, top_k, unknown, wanted, embedded, decided, attributed, *found)
        if len(call.missing) < len(call.keys):
            tokens = np.frombuffer(b"".join(call.missing), tokens.dtype)
            lengths = np.array([len(key) // tokens.itemsize for key in call.missing], lengths.dtype)
        timeout = self.callers.timeout(parameters, request.timeout())
        return QueuedRequest(call, tokens, lengths, is_bulk(parameters), timeout)

    def fits(self, lengths: Any) -> bool:
        """Return whether texts have at most `max_tokens` tokens or consist of full windows."""
        spec = self.engine.spec
        longest = lengths.max()
        if longest <= spec.max_tokens:
            return True
        full = lengths[lengths > spec.max_tokens] % spec.max_tokens == 0
        return bool(longest <= spec.windows * spec.max_tokens and full.all())

    def named(self, request: Any) -> set[str]:
        """Return the outputs that a request names.

        One that names no output at all, which Triton shows as all outputs, gets no decisions, attributes or embeddings,
        as it gets no logits.
        """
        named = set(request.requested_output_names())
        return set() if named == self.outputs else named

    def look_up(
        self, tokens: Any, lengths: Any, top_k: int, with_outputs: bool, kind: Kind
    ) -> tuple[list[bytes], dict[bytes, bytes], list[bytes]]:
        """Return the keys of a request's texts, their entries in the cache, and the keys that are not in it."""
        if not self.cache and kind != DECIDED:
            return [], {}, []
        keys = keys_of(tokens, lengths)
        known = {} if with_outputs else self.cache.find(keys, top_k, kind=kind)  # an entry holds no logits
        missing = list(dict.fromkeys(key for key in keys if key not in known))
        if not self.cache:
            return keys, known, missing
        self.metrics.add("aisle_cache_lookups_total", len(keys))
        if len(missing) < len(keys):
            self.metrics.add("aisle_cache_hits_total", len(keys) - len(missing))
        return keys, known, missing

    def abandoned(self, request: QueuedRequest) -> bool:
        """Return whether the caller no longer waits."""
        return request.age > request.timeout

    def compute(self, tokens: Any, lengths: Any) -> Any:
        work: defaultdict[str, float] = defaultdict(float)
        try:
            outputs = self.engine.outputs(tokens, lengths, work)
        except Exception as error:
            self.metrics.add("aisle_engine_failures_total")
            end_if_lost(error)
            raise
        for name, value in work.items():
            self.metrics.add(f"aisle_{name}_total", value)
        return outputs

    def answer(self, answers: Sequence[Answer]) -> None:
        """Rank the answers of a batch together, and send them from other threads."""
        good: list[tuple[QueuedRequest, Any]] = []
        failed: list[tuple[Any, Any]] = []
        for waiting, found in answers:
            if isinstance(found, TimeoutError):
                self.metrics.add("aisle_texts_late_total", len(waiting.lengths))
                failure = refusal("CANCELLED", "the caller stopped waiting before the request was computed")
                failed.append((waiting.request.request, failure))
            elif isinstance(found, Exception):
                failed.append((waiting.request.request, refusal("INTERNAL", f"the engine failed: {found}")))
            else:
                good.append((waiting, found))
        self.senders.put(failed)
        if good:
            waitings, outputs = zip(*good, strict=True)
            self.senders.put(self.ranked(waitings, outputs))

    def ranked(self, waiting: Sequence[QueuedRequest], outputs: Sequence[Any]) -> list[Ranked | tuple[Any, Any]]:
        """Rank the categories of all texts together, and count them."""
        calls: list[Call] = [each.request for each in waiting]
        labels, every = self.categories, self.engine.spec.labels
        logits = [own[:, :labels] for own in outputs]
        together = np.concatenate(logits)  # without what few requests want
        asked = zip(calls, outputs, strict=True)
        others = (own for call, own in asked if call.with_embeddings or call.with_attributes)
        if not (np.isfinite(together).all() and all(np.isfinite(own).all() for own in others)):
            return self.rank_finite(waiting, outputs)
        parts = self.pairs(calls, logits, together)
        fresh = self.entries(calls, logits, parts)
        if self.cache:
            self.metrics.add("aisle_cache_evictions_total", self.keep(calls, fresh))
        answers = [merged(call, part, rows) for call, part, rows in zip(calls, parts, fresh, strict=True)]
        self.count(waiting, [given(call, answer) for call, answer in zip(calls, answers, strict=True)])
        return [
            Ranked(
                call.request,
                self.labels.encoded(answer["index"]),
                answer["confidence"],
                call.unknown,
                of_each_text(call, own[:, :labels]) if call.with_logits else None,
                normalized(of_each_text(call, own[:, every:])) if call.with_embeddings else None,
                {**self.decisions(call, rows), **self.attributes_of(call, own[:, labels:every])},
            )
            for call, answer, own, rows in zip(calls, answers, outputs, fresh, strict=True)
        ]

    def pairs(self, calls: Sequence[Call], logits: Sequence[Any], together: Any) -> list[Any]:
        """Return the categories of the texts that were computed for each request, each [texts, k] of `PAIR`.

        Args:
            together: the same logits, concatenated.
        """
        if self.multi_label:
            return [self.multi_label.pairs(own, call.top_k) for call, own in zip(calls, logits, strict=True)]
        pairs = pairs_of(together, max(call.top_k for call in calls))
        return np.split(pairs, np.cumsum([len(own) for own in logits])[:-1])

    def entries(self, calls: Sequence[Call], logits: Sequence[Any], pairs: Sequence[Any]) -> list[dict[bytes, bytes]]:
        """Return for each request the cache entries of the texts that were computed for it."""
        asking = [number for number, call in enumerate(calls) if call.with_decisions]
        decided: Iterator[bytes] = iter(())
        if asking and self.decider:
            k = max(calls[number].top_k for number in asking)
            decided = iter(self.decider.entries(np.concatenate([logits[number] for number in asking]), k))
        return [
            dict(zip(call.missing, islice(decided, len(call.missing)), strict=True))
            if call.with_decisions
            else rows_of(call.missing, own)
            for call, own in zip(calls, pairs, strict=True)
        ]

    def keep(self, calls: Sequence[Call], entries: Sequence[dict[bytes, bytes]]) -> int:
        """Store the entries of requests in the cache; return how many older ones were dropped to make room."""
        dropped = 0
        for kind in {call.kind for call in calls}:
            own = [rows for call, rows in zip(calls, entries, strict=True) if call.kind == kind]
            dropped += self.cache.put({key: row for rows in own for key, row in rows.items()}, kind=kind)
        return dropped

    def decisions(self, call: Call, fresh: dict[bytes, bytes]) -> Tensors:
        """Return the decisions that a request asks for, and count them."""
        if not call.with_decisions or not self.decider:
            return {}
        rows = {**call.known, **fresh}
        entries = [rows[key] for key in call.keys]
        for decision, count in count_outcomes(entries).items():
            self.metrics.add("aisle_decisions_total", count, decision=decision)
        return self.decider.tensors(entries)

    def attributes_of(self, call: Call, logits: Any) -> Tensors:
        """Return the attributes that a request asks for, from the logits [texts, values] of its distinct texts."""
        if not call.with_attributes:
            return {}
        own = of_each_text(call, logits)
        return {**({} if call.with_decisions else no_decisions(len(own))), **self.attributes.tensors(own)}

    def count(self, waiting: Sequence[QueuedRequest], best: Sequence[Any]) -> None:
        """Count the requests and, unless they are for embeddings, the categories that `given` returns."""
        classified = [own for each, own in zip(waiting, best, strict=True) if not each.request.with_embeddings]
        if classified:
            together = np.concatenate(classified)
            self.metrics.add_confidences(together["confidence"])
            for name, count in self.labels.counts(together["index"]).items():
                self.metrics.add("aisle_categories_total", count, category=name)
        computed = [each for each in waiting if len(each.lengths)]
        self.metrics.add("aisle_queue_seconds_total", sum(each.queue_time for each in computed))
        self.metrics.add("aisle_queue_requests_total", len(computed))

    def rank_finite(self, waiting: Sequence[QueuedRequest], outputs: Sequence[Any]) -> list[Ranked | tuple[Any, Any]]:
        """Refuse the requests whose outputs are NaN or infinite, and rank the others."""
        self.metrics.add("aisle_engine_failures_total")
        finite = [bool(np.isfinite(own).all()) for own in outputs]
        good = [pair for pair, ok in zip(zip(waiting, outputs, strict=True), finite, strict=True) if ok]
        answers = iter(self.ranked(*zip(*good, strict=True)) if good else [])
        return [
            next(answers) if ok else (each.request.request, refusal("INTERNAL", NOT_FINITE))
            for each, ok in zip(waiting, finite, strict=True)
        ]

    def send(self, answer: Ranked | tuple[Any, Any]) -> None:
        request = answer.request if isinstance(answer, Ranked) else answer[0]
        request.get_response_sender().send(response(answer), pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        self.batcher.close()
        self.senders.close()
        self.metrics.close()


def asks_for(named: set[str], outputs: Iterable[str], available: Any, missing: str) -> bool:
    """Return whether a request, which names the outputs `named`, asks for one of `outputs`.

    Raises:
        InputError: it does, and they are not `available` in this version; the message is `missing`.
    """
    asks = not named.isdisjoint(outputs)
    if asks and not available:
        raise InputError(missing)
    return asks


def kind_of(top_k: int, decided: bool) -> Kind:
    """Return the kind of answer that a request wants."""
    if decided:
        return DECIDED
    return REACHED if top_k == ALL_REACHED else PLAIN


def merged(call: Call, computed: Any, fresh: dict[bytes, bytes]) -> Any:
    """Return a request's answer, [texts, top_k] of `PAIR`, from the computed texts and the cache."""
    if len(call.missing) == len(call.keys):
        return computed if call.top_k == ALL_REACHED else computed[:, : call.top_k]
    rows = {**call.known, **fresh}
    if call.top_k == ALL_REACHED:
        return read_reached(call.keys, rows)
    return read_rows(call.keys, rows, call.top_k, call.kind.head)


def given(call: Call, answer: Any) -> Any:
    """Return the categories that an answer gives its texts, of `PAIR`: the best of each, or those that are reached."""
    return reached_pairs(answer) if call.top_k == ALL_REACHED else answer[:, 0]


def of_each_text(call: Call, computed: Any) -> Any:
    """Return a row for each text of a request, from those of its distinct texts."""
    if len(call.missing) == len(call.keys):
        return computed
    rows = {key: row for row, key in enumerate(call.missing)}
    return computed[[rows[key] for key in call.keys]]


def normalized(vectors: Any) -> Any:
    """Return vectors [texts, size] of length 1, so that their inner product is the cosine similarity."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _counter(name: str) -> str:
    return f"aisle_{name}" if name.startswith("confidence_") else f"aisle_{name}_total"


def unpadded(request: Any) -> tuple[Any, Any]:
    """Return the concatenated token ids of a request's texts, [sum of lengths], and the lengths, [texts]."""
    input_ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
    lengths = pb_utils.get_input_tensor_by_name(request, "lengths").as_numpy()
    if len(input_ids) == 1:
        return input_ids[0], lengths[0]
    return input_ids[np.arange(input_ids.shape[1]) < lengths], lengths[:, 0]


def optional(request: Any, name: str) -> Any:
    """Return an optional input [texts, 1] of a request, or None."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def response(answer: Ranked | tuple[Any, Any]) -> Any:
    """Return the response for Triton: the tensors of an answer, or an error."""
    if not isinstance(answer, Ranked):
        return answer[1]
    tensors = [
        pb_utils.Tensor("category", answer.category),
        pb_utils.Tensor("confidence", np.ascontiguousarray(answer.confidence)),
    ]
    if answer.unknown is not None:
        tensors.append(pb_utils.Tensor("unknown", answer.unknown))
    if answer.logits is not None:
        tensors.append(pb_utils.Tensor("logits", np.ascontiguousarray(answer.logits)))
    if answer.embedding is not None:
        tensors.append(pb_utils.Tensor("embedding", np.ascontiguousarray(answer.embedding)))
    for name, values in answer.further.items():
        tensors.append(pb_utils.Tensor(name, np.ascontiguousarray(values)))
    return pb_utils.InferenceResponse(tensors)


def refusal(status: str, message: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, getattr(pb_utils.TritonError, status)))
