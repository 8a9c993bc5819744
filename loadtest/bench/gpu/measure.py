"""Time work on a GPU, and count the operations of a BERT. Everything also runs on a CPU, for the tests."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aisle.loadtest.generator import checked, closed_blocking, percentile

Batch = tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.integer[Any]]]  # tokens end to end, length of each text


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], min_seconds: float, warm_up: int = 3) -> float:
    """Return the median seconds of a call, over groups of calls. Each group waits once for the GPU."""
    for _ in range(warm_up):
        run()
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    group = max(1, round(min_seconds / 10 / max(time.perf_counter() - start, 1e-6)))
    times: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < min_seconds or not times:
        start = time.perf_counter()
        for _ in range(group):
            run()
        synchronize()
        times.append((time.perf_counter() - start) / group)
    return median(times)


def latencies_of(run: Callable[[Any], Any], inputs: Sequence[Any], min_seconds: float) -> dict[str, float]:
    """Return the median and the 99th percentile of single calls, in ms."""
    for each in inputs[:10]:
        run(each)
    load = checked(closed_blocking(run, itertools.cycle(inputs), 1, min_seconds))
    return {"p50_ms": 1e3 * percentile(load.latencies, 50), "p99_ms": 1e3 * percentile(load.latencies, 99)}


def throughput(run: Callable[[Batch], Any], batches: Sequence[Batch], min_seconds: float, threads: int) -> float:
    """Return texts per second, with results copied to the host. Each thread runs one batch after the other.

    All batches have the same number of texts.
    """
    load = checked(closed_blocking(run, itertools.cycle(batches), threads, min_seconds))
    return load.texts_per_second * len(batches[0][1])


def operations(config: Any, lengths: npt.NDArray[np.integer[Any]]) -> int:
    """Return the number of operations of a BERT classifier without padding, two for each multiplication.

    All layers count for all tokens, with attention within each text. Work that an engine can skip counts too, such as
    the last layer for all tokens but [CLS].
    """
    hidden, up = config.hidden_size, config.intermediate_size
    weights = 2 * int(lengths.sum()) * (4 * hidden * hidden + 2 * hidden * up)
    attention = 4 * hidden * int((lengths.astype(np.int64) ** 2).sum())
    return int(config.num_hidden_layers * (weights + attention))


def batches_of(lengths: Sequence[int], tokens: Sequence[int], size: int, most: int = 8) -> list[Batch]:
    """Cut concatenated texts into batches of `size`; texts are repeated if there are too few."""
    length, flat = np.array(lengths), np.array(tokens)
    ends = np.cumsum(length)
    texts = np.split(flat, ends[:-1])
    count = max(1, min(most, len(texts) // size))
    chosen = [[texts[(i * size + j) % len(texts)] for j in range(size)] for i in range(count)]
    return [(np.concatenate(each), np.array([len(text) for text in each])) for each in chosen]
