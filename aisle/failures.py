"""The exit code and the message of every exception that a command can raise."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterator
from urllib.error import URLError

from aisle.errors import InputError, OutputClosed, ServerError, Stopped
from aisle.extras import install_for

SERVER, INPUT, GATE, STOPPED, CLOSED = 1, 2, 3, 130, 141  # exit codes; the last two are 128 + SIGINT and 128 + SIGPIPE
TRACEBACK = "AISLE_TRACEBACK"  # if 1, the traceback is printed too

REMEDIES = {
    errno.ENOSPC: "free some space and run the command again",
    errno.EDQUOT: "free some space and run the command again",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a folder that can be written",
    errno.EMFILE: "raise the limit: ulimit -n",
    errno.ENAMETOOLONG: "choose a shorter name",
}
_ADDRESS = re.compile(r"\b(postgres(?:ql)?):/(?=[^/])")  # of a database, which has lost a slash as a path


def failure(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the message of an exception. The message is empty if the output was closed."""
    if isinstance(error, InputError):
        return INPUT, _ADDRESS.sub(r"\1://", str(error))
    if isinstance(error, ServerError):
        return SERVER, str(error)
    if isinstance(error, OutputClosed):
        return CLOSED, ""
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        return STOPPED, str(error) or "stopped"
    if type(error).__name__ == "GateError":  # by name, because a small installation lacks its module
        return GATE, str(error)
    if hasattr(error, "format_message"):  # typer's errors, whose classes are private
        return INPUT, _usage(error)
    if isinstance(error, ModuleNotFoundError) and (hint := _missing(error)):
        return INPUT, f"this command needs more packages: {hint}"
    if isinstance(error, OSError):
        return _of_system(error)
    if number := re.search(r"\(os error (\d+)\)", str(error)):  # of a library in Rust, such as safetensors
        return _of_system(OSError(int(number[1]), os.strerror(int(number[1]))))
    if isinstance(error, MemoryError):
        return SERVER, "out of memory; close other programs, or use smaller batches"
    if isinstance(error, RecursionError):
        return INPUT, "the input is nested too deeply; flatten it"
    return SERVER, f"{_summary(error)} ({_place(error)}); this is a bug in aisle: {TRACEBACK}=1 shows the traceback"


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _missing(error: ModuleNotFoundError) -> str | None:
    """Return the command that installs what this process's command needs; None if no extra contains the module."""
    command = next((each for each in sys.argv[1:] if not each.startswith("-")), "")
    served = any(each.partition("=")[0] == "--url" for each in sys.argv)
    return install_for(command, error.name or "", served=served)


def _usage(error: BaseException) -> str:
    """Return what is wrong with the arguments, and the command that prints the help."""
    message: str = error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    return f"{message.rstrip('.')}; see: {context.command_path} --help" if context else message


def _of_system(error: OSError) -> tuple[int, str]:
    """Return the exit code and message of an operating system's error: the file, the reason and a remedy."""
    if isinstance(error, URLError):
        return SERVER, str(error.reason)
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # from copying a folder
        source, _, reason = error.args[0][0]
        return INPUT, f"cannot copy {source}: {reason}"
    what = error.strerror or str(error) or type(error).__name__
    names = " → ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes))
    if isinstance(error, (ConnectionError, TimeoutError)):
        return SERVER, f"{names}: {what}" if names else what
    message = f"{names}: {what[:1].lower()}{what[1:]}" if names else what
    remedy = REMEDIES.get(error.errno or 0, "")
    return INPUT, f"{message}; {remedy}" if remedy else message


def _summary(error: BaseException) -> str:
    first = str(error).strip().splitlines()[:1]
    return f"{type(error).__name__}: {first[0]}" if first else type(error).__name__


def _place(error: BaseException) -> str:
    """Return the file and line that raised an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "unknown line"
