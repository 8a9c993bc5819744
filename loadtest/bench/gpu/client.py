"""client.py SETTINGS: one of several processes that load a server. It prints its measurements as one JSON object.

It runs in the server's environment, which has the client's packages and may lack PyTorch.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from aisle.client import AsyncClassifier, Classifier, Failure
from aisle.loadtest.generator import Load, closed, streamed


def files(settings: dict[str, Any], texts: list[str]) -> Load:
    """Stream texts, as for a file, from the time `begin` for `seconds`."""
    with Classifier(settings["url"], timeout=60) as classifier:
        batch = classifier.max_batch
        _wait_for_begin(settings)
        seconds = settings["seconds"]
        return streamed(classifier.stream, texts, 1, seconds, batch, lambda answer: isinstance(answer, Failure))


async def calls(settings: dict[str, Any], texts: list[str]) -> Load:
    """Send single texts from `callers` callers, from the time `begin` for `seconds`."""
    async with AsyncClassifier(settings["url"], timeout=60) as classifier:

        async def call(text: str) -> None:
            await classifier.classify([text])

        await call(texts[0])
        _wait_for_begin(settings)
        return await closed(call, itertools.cycle(texts), settings["callers"], settings["seconds"])


def _wait_for_begin(settings: dict[str, Any]) -> None:
    """Wait for the time at which all processes begin."""
    time.sleep(max(0.0, settings["begin"] - time.time()))


def main() -> None:
    settings = json.loads(sys.argv[1])
    texts = json.loads(Path(settings["texts"]).read_text("utf-8"))[settings["first"] :]
    load = files(settings, texts) if settings["kind"] == "files" else asyncio.run(calls(settings, texts))
    found = {"texts_per_second": load.texts_per_second, "failures": load.failures, "latencies": list(load.latencies)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
