"""The files in deploy/: the chart, rendered by Helm and checked against Kubernetes' schemas; images; compose."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from aisle.client import Classifier
from aisle.commands.app import app
from aisle.deploy.server.triton import free_ports

from .conftest import aisle

DEPLOY = Path(__file__).parent.parent / "deploy"
CHART = DEPLOY / "helm" / "aisle"
CUSTOM = {"ServiceMonitor", "PodMonitor", "PrometheusRule"}  # the Prometheus operator's; Kubernetes has no schema
BATCH = {
    "shards": 16,
    "claim": "tables",
    "input": "in.parquet",
    "output": "out.parquet",
    "textColumns": ["title", "brand"],
}
WATCH = {
    "schedule": "15 6 * * *",
    "claim": "tables",
    "args": [
        "/data/products.csv",
        "--contract=/data/contract.toml",
        "--labels=/data/fresh.csv",
        "--accuracy-at-least=1",
    ],
    "webhookSecret": "chat",
}
VALUES: dict[str, dict[str, Any]] = {
    "cpu": {},
    "gpu": yaml.safe_load((CHART / "values-gpu.yaml").read_text()),
    "batch": {"batch": BATCH},
    "watch": {"watch": WATCH},
    "bare": {"gateway": {"enabled": False}, "autoscaling": {"enabled": False}},
}
INSTALLED = {
    "checkpoint": {"claim": "checkpoints", "path": "2026/shop"},
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
    "traces": {"url": "http://collector:4318/v1/traces"},
}


class HelmError(Exception):
    pass


def helm(values: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("helm.py"))]
    given = json.dumps([str(CHART), {**INSTALLED, **values}])
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HelmError(done.stderr)
    return dict(json.loads(done.stdout))


def render(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for text in helm(values)["manifests"].values() for each in yaml.safe_load_all(text) if each]


def pods(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    cron = [each["spec"]["jobTemplate"]["spec"] for each in manifests if each["kind"] == "CronJob"]
    others = [each["spec"] for each in manifests if each["kind"] in {"Deployment", "Job"}]
    return [each["template"]["spec"] for each in (*others, *cron)]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def options(name: str) -> set[str]:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    return {option for parameter in command.params for option in parameter.opts}


def check_command(words: list[str]) -> None:
    """Make sure that a container's `aisle` command and its options exist."""
    name, *arguments = words[1:] if words[0] == "aisle" else words
    assert {argument.partition("=")[0] for argument in arguments if argument.startswith("--")} <= options(name)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_chart_matches_kubernetes_schemas(values: dict[str, Any]) -> None:
    assert helm(values)["errors"] == []
    manifests = render(values)
    for manifest in manifests:
        if manifest["kind"] not in CUSTOM:
            for version in ("1.30", kubernetes_validate.latest_version()):
                kubernetes_validate.validate(manifest, version, strict=True)
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_every_container_is_hardened(values: dict[str, Any]) -> None:
    for pod in pods(render(values)):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in containers(pod):
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"]
            assert not security["allowPrivilegeEscalation"]
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"]["cpu"]
            assert container["resources"]["limits"]["memory"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            if container["command"][0] == "aisle":
                check_command(container["command"] + container["args"])
            elif container["command"][0] == "python3":
                compile(container["command"][2], "engine", "exec")


def test_readiness_follows_the_model_and_pools_their_gpus() -> None:
    manifests = render(VALUES["gpu"])
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for manifest in manifests:
        by_kind.setdefault(manifest["kind"], []).append(manifest)
    for pool in ("h100", "l4"):
        (server,) = (each for each in by_kind["Deployment"] if each["metadata"]["name"] == f"shop-{pool}")
        (job,) = (each for each in by_kind["Job"] if each["metadata"]["labels"]["aisle.pool"] == pool)
        pod, build = server["spec"]["template"]["spec"], job["spec"]["template"]["spec"]
        assert pod["nodeSelector"] == build["nodeSelector"]  # built on the type of GPU that serves it
        assert pod["runtimeClassName"] == build["runtimeClassName"] == "nvidia"
        assert "--target=cuda" in build["initContainers"][0]["args"]
        assert server["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        for container in (pod["containers"][0], build["initContainers"][0]):
            assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
            (models,) = (m for m in container["volumeMounts"] if m["mountPath"] == "/models")
            assert models["subPath"] == pool
        probe = pod["containers"][0]["readinessProbe"]["httpGet"]["path"]
        assert probe == "/v2/models/product_classifier/ready"
        (scaler,) = (s for s in by_kind["HorizontalPodAutoscaler"] if s["metadata"]["name"] == f"shop-{pool}")
        assert scaler["spec"]["metrics"][0]["pods"] == {
            "metric": {"name": "aisle_queue_seconds"},
            "target": {"type": "AverageValue", "averageValue": "50m"},
        }
    (headless,) = (each for each in by_kind["Service"] if each["metadata"]["name"] == "shop-servers")
    assert headless["spec"]["clusterIP"] == "None"
    (rule,) = by_kind["PrometheusRule"]
    assert rule["spec"] == yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())


def test_a_pool_without_a_spare_gpu_replaces_its_servers_one_by_one() -> None:
    gpu = VALUES["gpu"]["pools"]
    manifests = render({"pools": {"cpu": None, "l4": {**gpu["l4"], "surge": 0}}})
    (server,) = (m for m in manifests if m["kind"] == "Deployment" and m["metadata"]["name"] == "shop-l4")
    assert server["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}


@pytest.mark.parametrize("rollout", [{}, {"canary": 0.1}, {"shadowSeconds": 60}, {"canary": 0.1, "shadowSeconds": 60}])
def test_no_rollout_has_options_that_the_command_refuses(rollout: dict[str, float], tmp_path: Path) -> None:
    (job,) = (each for each in render({"rollout": rollout}) if each["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    words = [word.replace("/models", str(tmp_path / "none")) for word in container["command"] + container["args"]]
    done = aisle(*words[1:])
    assert f"{tmp_path}/none is not a model repository" in done.stderr  # the first error


def test_another_checkpoint_makes_another_job() -> None:
    def job(path: str) -> str:
        manifests = render({"checkpoint": {"claim": "checkpoints", "path": path}})
        return next(str(each["metadata"]["name"]) for each in manifests if each["kind"] == "Job")

    assert job("a") == job("a") != job("b")


def test_each_pod_of_a_batch_takes_its_shard(tmp_path: Path) -> None:
    (job,) = (each for each in render({"batch": BATCH}) if "-batch-" in each["metadata"]["name"])
    assert (job["spec"]["completionMode"], job["spec"]["completions"], job["spec"]["parallelism"]) == ("Indexed", 16, 4)
    pod = job["spec"]["template"]
    assert pod["metadata"]["labels"]["aisle.caller"] == "true"  # so that the servers' network policy admits it
    assert pod["spec"]["restartPolicy"] == "Never"  # as backoffLimitPerIndex needs it
    (container,) = pod["spec"]["containers"]
    assert {"--url=shop-servers:8001", "--text-column=title", "--text-column=brand"} <= {*container["args"]}
    (tmp_path / "in.csv").write_text("title,brand\n")
    words = [word.replace("/data", str(tmp_path)).replace(".parquet", ".csv") for word in container["args"]]
    done = aisle("classify", *words)
    assert "JOB_COMPLETION_INDEX is not set" in done.stderr  # the first error


def test_the_watch_runs_on_its_schedule(tmp_path: Path) -> None:
    assert not any(each["kind"] == "CronJob" for each in render({}))
    (job,) = (each for each in render({"watch": WATCH}) if each["kind"] == "CronJob")
    assert job["spec"]["schedule"] == "15 6 * * *"
    pod = job["spec"]["jobTemplate"]["spec"]["template"]
    assert pod["metadata"]["labels"]["aisle.caller"] == "true"  # so that the servers' network policy admits it
    (container,) = pod["spec"]["containers"]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    assert variables == {"AISLE_URL": "shop-servers:8001", "AISLE_WEBHOOK": None}  # from the secret
    for name, text in (("products.csv", "text,category\na,b\n"), ("contract.toml", "rows_at_least = 2\n")):
        (tmp_path / name).write_text(text)
    done = aisle("watch", *(word.replace("/data", str(tmp_path)) for word in container["args"]))
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["checks"][0]["reasons"] == ["1 rows, fewer than 2"]


def test_another_table_makes_another_batch() -> None:
    def name(**changed: object) -> str:
        manifests = render({"batch": BATCH | changed})
        return next(str(each["metadata"]["name"]) for each in manifests if "-batch-" in each["metadata"]["name"])

    assert name() == name(parallelism=8) != name(input="other.parquet")


def test_the_gateway_gets_all_of_its_files() -> None:
    manifests = render({})
    (files,) = (m["data"] for m in manifests if m["kind"] == "ConfigMap" and m["metadata"]["name"] == "shop-gateway")
    assert "address: shop-servers, port_value: 8001" in files["envoy.yaml"]
    assert not any("example" in name for name in files)
    read = set(re.findall(r"/etc/envoy/(?!secrets)([\w.]+)", "".join(files.values())))
    assert read <= files.keys()


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"images": {"serve": "aisle:latest", "build": "a:1", "gateway": "e:1"}}, "serve"),
        ({"replica": 3}, "replica"),
        ({"batch": BATCH | {"claim": ""}}, "claim"),
        ({"watch": WATCH | {"claim": ""}}, "claim"),
        ({"watch": WATCH | {"args": []}}, "args"),
        ({"batch": BATCH | {"input": "/in.parquet"}}, "input"),
        ({"batch": BATCH | {"shards": -1}}, "shards"),
        ({"checkpoint": {"claim": "checkpoints", "path": ""}}, "path"),
        ({"pools": {"cpu": {"gpus": 1, "nodeSelector": {}}}}, "nodeSelector"),
        ({"pools": {"cpu": {"target": "tpu"}}}, "target"),
        ({"pools": {"cpu": {"target": "cuda"}}}, "target"),  # without a GPU
        ({"pools": {"cpu": {"gpus": 1, "nodeSelector": {"gpu": "l4"}, "target": "openvino"}}}, "target"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(HelmError, match=complaint):
        render(values)


def test_compose_names_existing_files() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = compose["services"]
    for service in services.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []) if not port.startswith("8443:"))
    for job in yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"]:
        assert set(job["dns_sd_configs"][0]["names"]) <= services.keys()
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert [source["url"] for source in sources] == ["http://prometheus:9090"]


def test_compose_streams_a_topic() -> None:
    services = yaml.safe_load((DEPLOY / "compose.kafka.yaml").read_text())["services"]
    workers = [service for name, service in services.items() if name.startswith("worker")]
    assert len({worker["hostname"] for worker in workers}) == 2  # their names in the group
    for worker in workers:
        check_command([word.replace("$$", "$") for word in worker["command"]])
        assert f" AS {worker['build']['target']}\n" in (DEPLOY.parent / worker["build"]["dockerfile"]).read_text()
    assert {"server", "topics"} == workers[0]["depends_on"].keys()


def test_compose_gives_a_server_the_gpu() -> None:
    (server,) = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"].values()
    assert (DEPLOY.parent / server["build"]["dockerfile"]).is_file()
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_images_start_an_existing_command(name: str) -> None:
    text = (DEPLOY / "docker" / name).read_text().replace("\\\n", "")
    assert "\nUSER 1000\n" in text
    assert 'ENTRYPOINT ["aisle"]' in text
    check_command(yaml.safe_load(re.findall(r"^CMD (.*)$", text, re.MULTILINE)[-1]))
    for line in re.findall(r"^# (docker .*?)(?:  #.*)?$", text, re.MULTILINE):
        words = shlex.split(line)
        assert (DEPLOY.parent / words[words.index("-f") + 1]).is_file()
        if "--target" in words:
            assert f" AS {words[words.index('--target') + 1]}\n" in text


# The container of compose and chart: read-only except for the repository, /tmp and /dev/shm, without privileges.
CONTAINED = """
mount --make-rprivate /
mount --bind {repository} /srv
mount -o remount,ro,bind /
mount -t tmpfs -o {options} tmpfs /tmp
mount -t tmpfs tmpfs /dev/shm
if touch /probe 2>/dev/null; then exit 1; fi
cd {root}
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all {python} -m aisle serve --repository /srv \
    --grpc-port {grpc} --metrics-port {metrics}
"""


def test_the_server_runs_with_the_limits_of_its_container(repository: Path) -> None:
    if os.getuid() or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("making a mount namespace takes root")
    if not shutil.which("setpriv") or any(path.is_relative_to("/tmp") for path in (DEPLOY, Path(sys.executable))):
        pytest.skip("needs setpriv, and nothing of Aisle under /tmp, which is hidden")
    (options,) = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]["tmpfs"]
    grpc, metrics = free_ports(2)
    script = CONTAINED.format(
        repository=repository,
        options=options.partition(":")[2],
        root=DEPLOY.parent,
        python=sys.executable,
        grpc=grpc,
        metrics=metrics,
    )
    environment = {**os.environ, "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": "/tmp"}
    command = ["unshare", "-m", "sh", "-e", "-c", script]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    assert any(line.startswith("ready: ") for line in process.stderr)
    with Classifier(f"localhost:{grpc}") as classifier:
        assert classifier.classify(["红富士苹果"])
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0
