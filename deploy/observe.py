"""Aisle's own figures in Triton's /metrics, told by the Python models; every series carries its version.

What the response cache answers reaches no model and is in nv_cache_num_hits_per_model alone.
"""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

SECONDS = 1.0  # between two reports: each series costs a round trip to the server's process
DESCRIPTIONS = {
    "aisle_texts_total": "Texts accepted",
    "aisle_texts_truncated_total": "Accepted texts cut at the limit of tokens",
    "aisle_texts_rejected_total": "Texts refused, by reason",
    "aisle_texts_late_total": "Texts that were not computed, as their caller had left",
    "aisle_personal_data_total": "Personal data replaced, by kind",
    "aisle_tokens_useful_total": "Tokens of texts that the engine computed",
    "aisle_tokens_computed_total": "Tokens that the engine computed, padding included",
    "aisle_engine_seconds_total": "Seconds spent in the engine, packing included",
    "aisle_engine_batches_total": "Batches that the engine ran",
    "aisle_engine_failures_total": "Batches that the engine failed to run",
    "aisle_queue_seconds_total": "Seconds that requests waited for the engine",
    "aisle_queue_requests_total": "Requests that the engine answered",
    "aisle_requests_refused_total": "Requests refused because too many were waiting",
    "aisle_categories_total": "Texts by their most probable category",
    "aisle_confidence_bucket": "Texts whose highest probability is le or less",
    "aisle_confidence_sum": "Sum of the highest probabilities",
    "aisle_confidence_count": "Texts answered",
    "aisle_model_info": "1 for a version that is loaded, 0 for one that was",
}
# Upper bounds of the histogram of confidence, its last one +Inf, laid out as Prometheus does.
BOUNDS = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
LES = [*(f"{bound:g}" for bound in BOUNDS), "+Inf"]

Series = tuple[str, tuple[tuple[str, str], ...]]  # name, labels


class Metrics:
    """Counts in this process, and reports to Triton from a thread: counting costs a request next to nothing."""

    def __init__(self, version: str, *unlabelled: str) -> None:
        """Show the counters of names `unlabelled` from the start, at 0; the others appear once they count."""
        self._version = version
        self._counts: defaultdict[Series, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._families: dict[str, Any] = {}
        self._metrics: dict[Series, Any] = {}
        self._shown: list[Series] = []
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
        """Add the highest probabilities of texts to the histogram."""
        below = np.searchsorted(np.sort(confidences), BOUNDS, side="right").tolist()
        for le, count in zip(LES, [*below, len(confidences)], strict=True):
            self.add("aisle_confidence_bucket", count, le=le)
        self.add("aisle_confidence_sum", float(confidences.sum()))
        self.add("aisle_confidence_count", len(confidences))

    def show(self, name: str, **labels: str) -> None:
        """Keep a gauge at 1 until `close`, which sets it to 0."""
        self._shown.append((name, tuple(labels.items())))

    def close(self) -> None:
        """Report what is left."""
        self._stopped.set()
        self._reporter.join()

    def _report_until_stopped(self) -> None:
        running = True
        while running:
            running = not self._stopped.wait(SECONDS)
            with self._lock:
                counts, self._counts = self._counts, defaultdict(float)
            for series, value in counts.items():
                self._metric(series, "COUNTER").increment(value)
            for series in self._shown:  # again each time: another process may have closed the same version
                self._metric(series, "GAUGE").set(float(running))

    def _metric(self, series: Series, kind: str) -> Any:
        if series not in self._metrics:
            name, labels = series
            if name not in self._families:
                family = pb_utils.MetricFamily  # which Triton puts there once the model's code is imported
                self._families[name] = _kept(family(name, DESCRIPTIONS[name], getattr(family, kind)))
            labelled = {**dict(labels), "version": self._version}
            self._metrics[series] = _kept(self._families[name].Metric(labels=labelled))
        return self._metrics[series]


def _kept(thing: Any) -> Any:
    """Keep a metric from ever being deleted, and return it.

    Triton counts references to a series for each process apart. Where two processes report it, as two instances do, or
    one version while it is loaded anew, the first to delete it takes it from the other, whose next report would
    write into freed memory of the server.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
    return thing
