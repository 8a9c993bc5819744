"""The errors that a user can correct. The command line prints each as one line on stderr."""


class InputError(ValueError):
    """The input cannot be used; the message says what to change. Exit code 2."""


class ServerError(RuntimeError):
    """The server could not be started or reached, or failed. Exit code 1."""


class OutputClosed(Exception):
    """The reader of the output, such as `head`, closed it. Exit code 141, without a message."""


class Stopped(Exception):
    """Ctrl-C stopped the command; the message says whether it can resume. Exit code 130."""
