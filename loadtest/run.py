"""Run Locust without its web page and read its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import locust

from aisle.errors import InputError, ServerError
from aisle.preprocess.table import read_labelled

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


def loadtest(data: Path, text_column: str, url: str, users: int, seconds: int, report: Path) -> dict[str, Any]:
    """Have `users` callers send the texts of a table one by one for some seconds; write Locust's HTML report.

    Returns throughput in texts per second, and latencies in milliseconds.

    Raises:
        InputError: the table cannot be read or is empty.
        ServerError: Locust failed, or no call was answered.
    """
    if next(read_labelled(data, text_column, text_column), None) is None:
        raise InputError(f"{data} has no rows")
    report.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary", "--json"]
    command += ["--host", url, "-u", str(users), "-r", str(users), "-t", f"{seconds}s", "--html", str(report)]
    environment = {**os.environ, "AISLE_DATA": str(data.resolve()), "AISLE_TEXT_COLUMN": text_column}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    rows = json.loads(done.stdout[done.stdout.find("[") :] or "[]")
    if not rows or rows[0]["num_requests"] == rows[0]["num_failures"]:
        raise ServerError(f"no call to {url} was answered; is the server up?")
    row = rows[0]
    times = sorted((float(ms), count) for ms, count in row["response_times"].items())
    return {
        "locust": locust.__version__,
        "users": users,
        "texts": row["num_requests"],
        "failures": row["num_failures"],
        "texts_per_second": round(row["num_requests"] / (row["last_request_timestamp"] - row["start_time"]), 1),
        **{f"p{p:g}_ms": percentile(times, p) for p in (50, 95, 99, 99.9)},
        "report": str(report),
    }


def percentile(times: list[tuple[float, int]], percent: float) -> float:
    """Return the least time that `percent` of the calls did not exceed, of a histogram sorted by time."""
    rank = percent / 100 * sum(count for _, count in times)
    for milliseconds, count in times:
        rank -= count
        if rank <= 0:
            return milliseconds
    return times[-1][0]
