"""The README's ten lines for other languages, run as they stand there."""

import re
from pathlib import Path

from aisle.client import Classifier

from .conftest import Server

README = Path(__file__).parent.parent / "README.md"


def block(marker: str) -> str:
    """Return the README's code block that holds `marker`."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    return next(code for code in blocks if marker in code)


def test_plain_grpc(server: Server, classifier: Classifier) -> None:
    scope: dict[str, object] = {}
    exec(block("service_pb2_grpc").replace("localhost:8001", server.url), scope)
    expected = classifier.classify(["蓝牙耳机 降噪", "usb c cable 2m"])
    assert scope["categories"] == [answer.category for answer in expected]


def test_client_example(server: Server, capsys: object) -> None:
    scope: dict[str, object] = {}
    exec(block("from aisle.client import Classifier").replace("localhost:8001", server.url), scope)
