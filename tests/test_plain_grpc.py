"""Run the code examples of the README and the manual."""

import re
from pathlib import Path

from aisle.client import Classifier

from .conftest import Server

ROOT = Path(__file__).parent.parent


def block(page: str, marker: str) -> str:
    """Return the page's code block that holds `marker`."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S)
    return next(code for code in blocks if marker in code)


def test_plain_grpc(server: Server, classifier: Classifier) -> None:
    scope: dict[str, object] = {}
    exec(block("docs/how-to/languages.md", "service_pb2_grpc").replace("localhost:8001", server.url), scope)
    expected = classifier.classify(["蓝牙耳机 降噪", "usb c cable 2m"])
    assert scope["categories"] == [answer.category for answer in expected]


def test_client_example(server: Server, capsys: object) -> None:
    scope: dict[str, object] = {}
    exec(block("README.md", "from aisle.client import Classifier").replace("localhost:8001", server.url), scope)
