"""What callers cannot do, what no log contains, and what is never executed."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import InferenceServerClient, InferenceServerException

from aisle.client import TLS, Classifier, ClassifierError, InvalidText, Unavailable
from aisle.deploy.server.access import ServerTLS, admin_headers
from aisle.deploy.server.triton import free_ports
from aisle.errors import InputError
from aisle.preprocess.clean import MAX_BYTES, prepare
from aisle.preprocess.values import TextError
from aisle.train.core.checkpoint import Checkpoint
from aisle.train.fit.model import from_pretrained

from .conftest import Server, aisle

CANARY = "f00dcafe 红富士苹果"


@pytest.fixture(scope="module")
def triton(server: Server) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def admin(server: Server) -> dict[str, str]:
    return admin_headers(int(server.url.partition(":")[2]))


Call = Callable[[InferenceServerClient, dict[str, str] | None], Any]
CLOSED: dict[str, Call] = {
    "list models": lambda triton, h: triton.get_model_repository_index(headers=h),
    "load": lambda triton, h: triton.load_model("encoder", headers=h),
    "unload": lambda triton, h: triton.unload_model("encoder", headers=h),
    "shared memory": lambda triton, h: triton.register_system_shared_memory("x", "/x", 8, headers=h),
    "shared memory status": lambda triton, h: triton.get_system_shared_memory_status(headers=h),
    "GPU memory": lambda triton, h: triton.register_cuda_shared_memory("x", b"", 0, 8, headers=h),
    "log settings": lambda triton, h: triton.get_log_settings(headers=h),
    "set log": lambda triton, h: triton.update_log_settings({"log_verbose_level": 9}, headers=h),
    "trace settings": lambda triton, h: triton.get_trace_settings(headers=h),
    "set trace": lambda triton, h: triton.update_trace_settings(settings={"trace_level": ["TENSORS"]}, headers=h),
}


@pytest.mark.parametrize("what", CLOSED)
@pytest.mark.parametrize("key", [None, "", "0" * 64])
def test_callers_cannot_use_restricted_protocols(
    triton: InferenceServerClient, admin: dict[str, str], what: str, key: str | None
) -> None:
    headers = None if key is None else dict.fromkeys(admin, key)
    with pytest.raises(InferenceServerException, match="This protocol is restricted"):
        CLOSED[what](triton, headers)


@pytest.mark.parametrize("what", ["list models", "shared memory status", "log settings", "trace settings"])
def test_the_key_allows_restricted_protocols(triton: InferenceServerClient, admin: dict[str, str], what: str) -> None:
    CLOSED[what](triton, admin)


def test_callers_can_query_metadata(triton: InferenceServerClient, classifier: Classifier) -> None:
    assert triton.is_server_ready()
    assert triton.is_model_ready("product_classifier")
    assert triton.get_model_metadata("product_classifier").versions == ["1"]
    assert triton.get_model_config("product_classifier").config.max_batch_size == 64
    assert classifier.classify([CANARY])


def test_only_the_owner_can_read_the_key(
    server: Server, admin: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = server.url.partition(":")[2]
    code = (
        "import os, sys\n"
        "from aisle.deploy.server import access\n"
        "file = access._key_file(int(sys.argv[1]))\n"
        "print(oct(file.stat().st_mode & 0o777), oct(file.parent.stat().st_mode & 0o777))\n"
    )
    shown = subprocess.run([sys.executable, "-c", code, port], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["0o600", "0o700"]
    assert not any(key in server.log.read_text("utf-8", "replace") for key in admin.values())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # a killed server may have left the key of a free port
    with pytest.raises(InputError, match="this user runs no server on port"):
        admin_headers(free_ports(1)[0])


def test_a_key_folder_made_by_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"aisle-{os.getuid()}"
    folder.mkdir(mode=0o755)
    with pytest.raises(InputError, match="only this user can read"):
        admin_headers(8001)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(InputError, match="only this user can read"):
        admin_headers(8001)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem; server.key, server.pem; client.key, client.pem; stranger.key and stranger.pem of another authority."""
    folder = tmp_path_factory.mktemp("pki")
    authority, other = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, issuer in (("server", authority), ("client", authority), ("stranger", other)):
        pair = issuer.issue_cert("localhost")
        pair.private_key_pem.write_to_path(folder / f"{name}.key")
        pair.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    return folder


def test_mutual_tls_from_a_read_only_repository(
    repository: Path, pki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`aisle serve` as a container runs it: no shell, nothing to write to but TMPDIR and /dev/shm; mutual TLS."""
    grpc, metrics = map(str, free_ports(2))
    command = ["env", "PATH=/nowhere", sys.executable, "-m", "aisle", "serve", "--repository", str(repository)]
    command += ["--grpc-port", grpc, "--metrics-port", metrics, "--tls-cert", str(pki / "server.pem")]
    command += ["--tls-key", str(pki / "server.key"), "--tls-client-ca", str(pki / "ca.pem")]
    # Root can write anywhere, so the repository is mounted read-only, in its own namespace.
    mounts = f"mount --bind {repository} {repository} && mount -o remount,ro,bind {repository} {repository}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mounts], capture_output=True, check=False).returncode == 0:
        command = ["unshare", "-m", "sh", "-c", f'{mounts} && exec "$@"', "sh", *command]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("ready: "):
            break
    try:
        assert lines[-1].startswith(f"ready: gRPC on 127.0.0.1:{grpc}, mutual TLS")
        url = f"localhost:{grpc}"
        known = TLS(pki / "ca.pem", pki / "client.key", pki / "client.pem")
        with Classifier(url, tls=known, timeout=60) as classifier:
            assert classifier.classify([CANARY])
        strangers = (None, TLS(pki / "ca.pem"), TLS(pki / "ca.pem", pki / "stranger.key", pki / "stranger.pem"))
        for stranger in strangers:
            with Classifier(url, tls=stranger, retries=0) as classifier, pytest.raises(Unavailable):
                classifier.classify([CANARY])
        names = {"CA": "ca.pem", "KEY": "client.key", "CERT": "client.pem"}
        own = {f"AISLE_TLS_{name}": str(pki / file) for name, file in names.items()}
        assert aisle("classify", CANARY, "--url", url, env=own).returncode == 0
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        assert admin_headers(int(grpc))
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"aisle-{os.getuid()}"}
    assert not any((tmp_path / f"aisle-{os.getuid()}").iterdir())


def test_tls_files_are_checked_before_the_start(pki: Path) -> None:
    for certificate, key, authority in [
        ("server.pem", "client.key", None),
        ("none.pem", "server.key", None),
        ("server.key", "server.key", None),
        ("server.pem", "server.key", "server.key"),
        ("server.pem", "server.key", "none.pem"),
    ]:
        tls = ServerTLS(pki / certificate, pki / key, pki / authority if authority else None)
        with pytest.raises(InputError, match="cannot use"):
            tls.arguments()
    with pytest.raises(InputError, match="both"):
        Classifier("localhost:1", tls=TLS(pki / "ca.pem", pki / "client.key"))
    with pytest.raises(InputError, match="NAME:SECRET"):
        Classifier("localhost:1", tls=TLS(), token="x")
    for option in ("--tls-cert", "--tls-key", "--tls-client-ca"):
        done = aisle("serve", option, pki / "server.pem")
        assert done.returncode == 2
        assert "--tls-cert" in done.stderr
        done = aisle("serve", option, "none.pem")  # the existence of files is checked first
        assert (done.returncode, done.stderr) == (2, "aisle: none.pem: no such file\n")


def test_no_text_in_any_log(
    server: Server, classifier: Classifier, triton: InferenceServerClient, admin: dict[str, str]
) -> None:
    """Good, bad and too long texts, with Triton at its most verbose."""
    triton.update_log_settings({"log_verbose_level": 9}, headers=admin)
    messages = []
    try:
        classifier.classify([CANARY, "f00dcafe"])
        for text in (b"f00dcafe\xff", "f00dcafe" * (MAX_BYTES // 8 + 1), "<f00dcafe>", "f00dcafe\ud800"):
            with pytest.raises(InvalidText) as caught:
                classifier.classify([CANARY, text])
            messages.append(str(caught.value))
        with pytest.raises(InvalidText) as caught:
            classifier.classify([CANARY], top_k=10_000)
        messages.append(str(caught.value))
        with Classifier(server.url, model_version="9") as nobody, pytest.raises(ClassifierError) as failed:
            nobody.classify([CANARY])
        messages.append(str(failed.value))
    finally:
        triton.update_log_settings({"log_verbose_level": 0}, headers=admin)
    log = server.log.read_text("utf-8", "replace")
    assert "ModelInferHandler" in log  # the log was verbose
    for place in (log, *messages):
        assert "f00dcafe" not in place.casefold()


@given(text=st.text(min_size=1) | st.binary(min_size=1))
def test_error_messages_contain_no_text(text: str | bytes) -> None:
    complaint = ""
    try:
        prepare(text)
    except TextError as error:
        complaint = str(error)
    shown = text if isinstance(text, str) else text.decode("latin-1")
    assert len(shown) < 4 or shown not in complaint


class Malice:
    """When unpickled, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_pickles_are_not_opened(checkpoint: Path, tmp_path: Path) -> None:
    """A model with only pickled weights is refused in one line, and code in the pickle does not run."""
    trap = tmp_path / "executed"
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "labels.json"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malice(trap)))
    with pytest.raises(InputError, match=r"lacks model\.safetensors"):
        _ = Checkpoint(folder).model
    with pytest.raises(InputError, match="safetensors") as caught:
        from_pretrained(str(folder), ["a", "b"], 128, 0.1)
    assert "\n" not in str(caught.value)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Malice(trap)))
    with pytest.raises(InputError, match="cannot be loaded"):
        _ = Checkpoint(folder).model
    assert not trap.exists()


def test_code_in_a_model_folder_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    """A configuration that names its own code is refused or read as plain BERT; the code does not run."""
    folder, trap = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(trap)!r})\nclass Config: ...\nclass Model: ...\n")
    with contextlib.suppress(InputError):
        from_pretrained(str(folder), ["a", "b"], 128, 0.1)
    assert not trap.exists()
