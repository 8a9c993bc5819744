"""Aisle's own metrics in Triton's /metrics, reported by the Python models. Every series has the label `version`."""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

REPORT_SECONDS = 1.0  # between two reports: each series costs a round trip to the server's process
DESCRIPTIONS = {
    "aisle_texts_total": "Texts accepted",
    "aisle_texts_truncated_total": "Accepted texts truncated at the token limit",
    "aisle_texts_unknown_total": "Accepted texts in which at least a quarter of the tokens is unknown to the model",
    "aisle_texts_rejected_total": "Texts refused, by reason",
    "aisle_texts_late_total": "Texts that were not computed because their caller stopped waiting",
    "aisle_personal_data_total": "Personal data replaced, by kind",
    "aisle_tokens_useful_total": "Tokens of texts that the engine computed",
    "aisle_tokens_computed_total": "Tokens that the engine computed, including padding",
    "aisle_engine_seconds_total": "Seconds spent in the engine, including packing",
    "aisle_engine_batches_total": "Batches that the engine ran",
    "aisle_engine_failures_total": "Batches that the engine failed to run, and requests whose logits were not finite",
    "aisle_queue_seconds_total": "Seconds that interactive and bulk requests waited for the engine",
    "aisle_queue_requests_total": "Requests that the engine answered",
    "aisle_requests_refused_total": "Requests refused because their queue, interactive or bulk, was full",
    "aisle_cache_lookups_total": "Texts looked up in the answer cache",
    "aisle_cache_hits_total": "Looked-up texts not computed: cached, or equal to another row of their request",
    "aisle_cache_evictions_total": "Answers dropped from the cache to make room for newer ones",
    "aisle_categories_total": "Texts by their most probable category; of a multi-label version, by each category given",
    "aisle_decisions_total": "Texts with a decision, by decision: accept, review or unknown",
    "aisle_confidence_bucket": "Texts whose highest probability is le or less",
    "aisle_confidence_sum": "Sum of the highest probabilities",
    "aisle_confidence_count": "Texts answered",
    "aisle_model_info": "1 for a version that is loaded, 0 after it was unloaded",
    "aisle_reports_total": "Reports of a step's process, one per second; it stops rising if the process is frozen",
}
# Upper bounds of the confidence histogram; Prometheus adds +Inf as the last.
BOUNDS = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
LES = [*(f"{bound:g}" for bound in BOUNDS), "+Inf"]

Series = tuple[str, tuple[tuple[str, str], ...]]  # name, labels


class Metrics:
    """Counts in this process and reports to Triton from a thread, so that counting costs requests almost nothing."""

    def __init__(self, version: str, process: str, *unlabelled: str) -> None:
        """Report the counters named in `unlabelled` from the start, at 0; others appear with their first count.

        Args:
            version: of the model; a label of every series.
            process: Triton's name of the instance; the label `process` of `aisle_reports_total`.
        """
        self._version = version
        self._reports: Series = ("aisle_reports_total", (("process", process),))
        self._counts: defaultdict[Series, float] = defaultdict(float)
        self._confidences: list[npt.NDArray[np.float32]] = []  # since the last report
        self._lock = threading.Lock()
        self._families: dict[str, Any] = {}
        self._metrics: dict[Series, Any] = {}
        self._gauges: list[Series] = []
        for name in unlabelled:
            self._metric((name, ()), "COUNTER")
        self._stopped = threading.Event()
        self._reporter = threading.Thread(target=self._report_until_stopped, daemon=True)
        self._reporter.start()

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name, tuple(labels.items())] += value

    def add_confidences(self, confidences: npt.NDArray[np.float32]) -> None:
        """Add the confidences of texts [texts] to the histogram, which the reporter computes."""
        with self._lock:
            self._confidences.append(confidences)

    def _count_confidences(self, counts: defaultdict[Series, float], confidences: npt.NDArray[np.float32]) -> None:
        below = np.searchsorted(np.sort(confidences), BOUNDS, side="right").tolist()
        for le, count in zip(LES, [*below, len(confidences)], strict=True):
            counts["aisle_confidence_bucket", (("le", le),)] += count
        counts["aisle_confidence_sum", ()] += float(confidences.sum())
        counts["aisle_confidence_count", ()] += len(confidences)

    def set_until_closed(self, name: str, **labels: str) -> None:
        """Set a gauge to 1; `close` sets it to 0."""
        self._gauges.append((name, tuple(labels.items())))

    def close(self) -> None:
        """Report the last counts and end the thread."""
        self._stopped.set()
        self._reporter.join()

    def _report_until_stopped(self) -> None:
        running = True
        while running:
            running = not self._stopped.wait(REPORT_SECONDS)
            with self._lock:
                counts, self._counts = self._counts, defaultdict(float)
                confidences, self._confidences = self._confidences, []
            if confidences:
                self._count_confidences(counts, np.concatenate(confidences))
            for series, value in counts.items():
                self._metric(series, "COUNTER").increment(value)
            for series in self._gauges:  # each time, because another process may have set it to 0
                self._metric(series, "GAUGE").set(float(running))
            self._metric(self._reports, "COUNTER").increment(1)  # last, so that a report is counted after its figures

    def _metric(self, series: Series, kind: str) -> Any:
        if series not in self._metrics:
            name, labels = series
            if name not in self._families:
                family = pb_utils.MetricFamily  # Triton adds this class after it imports the model's code
                self._families[name] = _never_delete(family(name, DESCRIPTIONS[name], getattr(family, kind)))
            labelled = {**dict(labels), "version": self._version}
            self._metrics[series] = _never_delete(self._families[name].Metric(labels=labelled))
        return self._metrics[series]


def _never_delete(metric: Any) -> Any:
    """Prevent a metric from ever being deleted, and return it.

    Triton counts the references to a series separately for each process. Two processes report the same series if there
    are two instances, or while a version is reloaded. When the first process deletes the series, it is freed for both,
    and the next report of the other process would write into freed memory of the server.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(metric))
    return metric
