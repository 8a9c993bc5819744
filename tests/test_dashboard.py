"""Dashboard and alerts use only metrics that a running server has."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from aisle.client import Classifier, InvalidText
from aisle.deploy.server.triton import free_ports

from .conftest import Server, wait_for

ROOT = Path(__file__).parent.parent
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "aisle.json").read_text("utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
GROUPS: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text("utf-8"))["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
CASES = sorted((ROOT / "tests" / "alerts").glob("*.yaml"))
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


def metric_names(expression: str) -> set[str]:
    """Return the metrics of a query: words with our prefixes, without label selectors."""
    return set(re.findall(r"\b(?:nv|aisle|envoy)_\w+", re.sub(r"\{[^}]*\}", "", expression)))


def names(prefix: str) -> set[str]:
    found = set().union(*(metric_names(each) for each in [*QUERIES, *(rule["expr"] for rule in RULES)]))
    return {name for name in found if name.startswith(prefix)}


def told(address: str, path: str = "metrics") -> set[str]:
    """Return the names of all series of an endpoint."""
    text = urllib.request.urlopen(f"http://{address}/{path}", timeout=30).read().decode()
    return set(re.findall(r"^[a-z]\w*", text, re.MULTILINE))


def stir(classifier: Classifier, number: int) -> None:
    """Send texts of every counted kind: ordinary, cached, too long, with personal data, refused."""
    texts = [f"红富士苹果 {number}斤", f"手机壳 {number} " * 200, f"客服电话 138001380{number % 90 + 10}"]
    for _ in range(2):
        classifier.classify(texts)
    with pytest.raises(InvalidText):
        classifier.classify([""])


def test_a_running_server_has_every_metric_of_dashboard_and_alerts(server: Server, classifier: Classifier) -> None:
    stir(classifier, 0)
    wanted = {name for name in names("nv_") | names("aisle_") if not name.startswith("nv_gpu_")}  # these need a GPU
    wait_for(lambda: wanted <= told(server.metrics))  # the models report every second


@pytest.fixture
def prometheus(server: Server, tmp_path: Path) -> Iterator[str]:
    """A real Prometheus that scrapes the server and evaluates the alerts."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus here: apt-get install prometheus")
    jobs = [{"job_name": "aisle", "static_configs": [{"targets": [server.metrics]}]}]
    settings = {"global": {"scrape_interval": "1s"}, "rule_files": [str(ALERTS)], "scrape_configs": jobs}
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    (port,) = free_ports(1)
    command = [program, f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data"]
    process = subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(30)


def ask(prometheus: str, query: str) -> list[Any]:
    url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    result: list[Any] = json.loads(urllib.request.urlopen(url, timeout=30).read())["data"]["result"]
    return result


def test_every_panel_has_data(prometheus: str, classifier: Classifier) -> None:
    rule = yaml.safe_load((ROOT / "deploy" / "prometheus" / "adapter.yaml").read_text())["rules"][0]
    scaling = rule["metricsQuery"].replace("<<.GroupBy>>", "instance").replace("<<.LabelMatchers>>", 'instance!=""')
    assert rule["seriesQuery"].partition("{")[0] in metric_names(scaling)
    queries = {
        query.replace("$__rate_interval", "10s").replace("$instance", ".*")
        for query in [*QUERIES, scaling]
        if not metric_names(query) & (names("envoy_") | names("nv_gpu_"))
    }
    empty = set(queries)
    deadline = time.monotonic() + 120
    for number in itertools.count():
        stir(classifier, number)
        with suppress(urllib.error.URLError):  # Prometheus is starting
            empty = {query for query in empty if not ask(prometheus, query)}
        if not empty or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert not empty
    assert ask(prometheus, 'ALERTS{alertstate="firing"}') == []


@pytest.mark.parametrize("arguments", [["check", "rules", ALERTS], ["test", "rules", *CASES]])
def test_alerts_fire_as_expected(arguments: list[Any]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here: apt-get install prometheus")
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_documented() -> None:
    operations = (ROOT / "docs" / "operations.md").read_text("utf-8")
    tests = [test for file in CASES for test in yaml.safe_load(file.read_text("utf-8"))["tests"]]
    tried = {case["alertname"] for test in tests for case in test.get("alert_rule_test", []) if case.get("exp_alerts")}
    for rule in RULES:
        assert rule["alert"] in tried
        assert f"### {rule['alert']}\n" in operations
        assert rule["labels"]["severity"] in {"critical", "warning"}
    assert len(re.findall(r"^### Aisle\w+$", operations, re.MULTILINE)) == len(RULES)


def test_the_dashboard_is_well_formed() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    places = [
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(places)) == len(places)
    assert max(x for x, _ in places) < 24
    for panel in PANELS:
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
