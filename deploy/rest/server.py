"""`aisle rest`: serve the application with uvicorn until a signal stops it."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.supervisors import Multiprocess

from aisle.console import say
from aisle.deploy.rest.access import LOG, AccessLog
from aisle.deploy.rest.app import create_app
from aisle.deploy.rest.front import Upstream
from aisle.errors import InputError

STOP_SECONDS = 30  # for requests in flight at a stop


@dataclass(frozen=True)
class RestOptions:
    """Where to listen, and for which server."""

    upstream: Upstream
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    certificate: Path | None = None  # PEM; both or neither
    key: Path | None = None


def serve_rest(options: RestOptions) -> None:
    """Serve until SIGTERM or Ctrl-C. Requests in flight are completed, for at most `STOP_SECONDS`.

    Raises:
        InputError: the server's address, a token or a file of TLS is invalid, or the port is taken.
    """
    options.upstream.connect()  # refuses bad options before the processes start
    config = uvicorn.Config(
        partial(application, options.upstream),
        factory=True,
        loop="uvloop",  # which sends an answer in one piece
        http="httptools",
        ws="none",
        workers=options.workers,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=STOP_SECONDS,
        ssl_certfile=options.certificate,
        ssl_keyfile=options.key,
    )
    listening = listen(options.host, options.port)
    scheme = "https" if options.certificate else "http"
    say(f"REST at {scheme}://{options.host}:{options.port}, described at /docs, for {options.upstream.url}")
    run_until_stopped(config, listening)


def run_until_stopped(config: uvicorn.Config, listening: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, in as many processes as the configuration says."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # uvicorn has its own, and repeats the signal at its end
    with suppress(KeyboardInterrupt):
        if config.workers > 1:
            Multiprocess(config, sockets=[listening]).run()
        else:
            uvicorn.Server(config).run(sockets=[listening])


def application(upstream: Upstream) -> ASGIApp:
    """Return the application for one process, with its log."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    # It would log that an answer was cut off, with a traceback; the access log has the cause.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    return AccessLog(create_app(upstream))


def listen(host: str, port: int) -> socket.socket:
    """Bind the port, so that a taken one is an error before anything starts.

    Raises:
        InputError: it cannot be bound.
    """
    try:
        found: Any = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server(found[4], family=found[0], backlog=2048)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port") from None
    listening.setblocking(False)
    listening.set_inheritable(True)
    return listening
