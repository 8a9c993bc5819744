"""The entry point of the `aisle` command. It prints every error as one line."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence


def main() -> None:
    """Run the command that this process's arguments name, and exit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during imports, Ctrl-C ends without a traceback
    from aisle.console import prepare_streams

    prepare_streams()
    stopped_by = _stop_as_ctrl_c()
    code = run()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the exit may wait for threads; Ctrl-C ends that
    sys.exit(128 + stopped_by[0] if stopped_by else code)


def _stop_as_ctrl_c() -> list[int]:
    """Make `kill` and a closed terminal stop a command as Ctrl-C does, so that no temporary files stay.

    Returns a list that will hold the number of the signal. A second signal ends the process at once.
    """
    received: list[int] = []
    process = os.getpid()

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != process:  # a child that has not replaced this program
            os.kill(os.getpid(), number)
        received.append(number)
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
            signal.signal(number, stop)
    return received


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. An error is one line on stderr, never a traceback.

    Args:
        arguments: as on the command line, without the program's name; by default those of this process.
    """
    from aisle.commands.app import app
    from aisle.console import detect_closed_output

    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = int(app(arguments, prog_name="aisle", standalone_mode=False) or 0)
        with detect_closed_output():
            sys.stdout.flush()  # so that a failed write is reported here
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1
    except BaseException as error:
        return _fail(error)
    return code


def _fail(error: BaseException) -> int:
    from aisle.console import printable, stderr
    from aisle.failures import CLOSED, GATE, TRACEBACK, chain, failure

    code, message = failure(error)
    for each in chain(error):
        traceback.clear_frames(each.__traceback__)  # ends a progress bar before the message
    try:
        if os.environ.get(TRACEBACK) == "1":
            traceback.print_exception(error)
        if code == GATE:
            _show_gate(error)
        if message:
            stderr.print(printable("aisle: " + " ".join(message.split())), soft_wrap=True)
        sys.stdout.flush()
    except OSError:
        pass
    if code == CLOSED or isinstance(error, OSError):
        _forget_output()
    return code


def _forget_output() -> None:
    """Discard buffered output for a closed pipe or a full disk, so that the exit does not fail again."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError):
        pass


def _show_gate(error: BaseException) -> None:
    """Show the gate's limits beside the engine's figures."""
    from aisle.console import new_table, stderr

    row = error.row  # type: ignore[attr-defined]
    table = new_table("", "required", "measured")
    table.add_row("top-1 agreement", f"≥ {row['least_agreement']:.2%}", f"{row['agreement']:.2%}")
    table.add_row("macro-F1 loss", f"≤ {row['largest_f1_loss']:.2%}", f"{row['f1_loss']:.2%}")
    stderr.print(table)
