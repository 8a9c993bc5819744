"""Classify for many users at once, like an asyncio web service: one client for all users. One text is bad."""

import argparse
import asyncio

from aisle.client import AsyncClassifier, InvalidText

USERS = {
    "anna": "蓝牙耳机 主动降噪",
    "bo": "婴儿奶粉 3段 900g",
    "chen": "",  # nothing to classify
    "dana": "wireless earbuds with case",
}


async def answer(classifier: AsyncClassifier, user: str, text: str) -> str:
    try:
        (prediction,) = await classifier.classify([text])
    except InvalidText as error:
        return f"{user}: please change your text ({error})"
    return f"{user}: {prediction.category} ({prediction.confidence:.3f})"


async def main(url: str) -> None:
    async with AsyncClassifier(url) as classifier:
        for line in await asyncio.gather(*(answer(classifier, *each) for each in USERS.items())):
            print(line)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--url", default="localhost:8001")
asyncio.run(main(parser.parse_args().url))
