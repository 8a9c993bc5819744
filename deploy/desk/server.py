"""`aisle desk`: serve the pages with uvicorn until a signal stops it."""

from __future__ import annotations

import logging

import uvicorn

from aisle.console import say
from aisle.deploy.desk.app import create_app
from aisle.deploy.desk.desk import Desk, DeskOptions
from aisle.deploy.rest.server import listen, run_until_stopped

STOP_SECONDS = 5  # for requests in flight at a stop


def serve_desk(options: DeskOptions) -> None:
    """Serve until SIGTERM or Ctrl-C. Jobs that run then resume with the next start.

    Raises:
        InputError: the server's address, the folder or a file of TLS is invalid, or the port is taken.
    """
    desk = Desk(options)
    _ = desk.classifier  # refuses a bad address
    listening = listen(options.host, options.port)
    scheme = "https" if options.certificate else "http"
    say(f"the desk is at {scheme}://{options.host}:{options.port}, for the server at {options.url}")
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # the pages say what failed
    config = uvicorn.Config(
        create_app(desk),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=STOP_SECONDS,
        ssl_certfile=options.certificate,
        ssl_keyfile=options.key,
    )
    run_until_stopped(config, listening)
