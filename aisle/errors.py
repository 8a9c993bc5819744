"""The errors a user can mend. The command line prints each as one line on stderr."""


class InputError(ValueError):
    """What was handed in cannot be used; the message says what to change. Exit code 2."""


class ServerError(RuntimeError):
    """The server could not be started or reached, or failed. Exit code 1."""
