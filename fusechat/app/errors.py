"""The one exception that is a message to the person at the keyboard rather than a bug."""

HELD = 3  # exit code where another process is at work on the output


class UserError(ValueError):
    """A mistake in a command, a config or an input file.

    The message is one line: the value, what was expected, and the command or key that mends it.
    Entries print it without a traceback (``HYDRA_FULL_ERROR=1`` shows one) and exit with ``code``.
    """

    def __init__(self, message: str = "", code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def one_of(value: str, known: "list[str] | tuple[str, ...]", key: str) -> str:
    """Returns ``value`` if it is among ``known``; otherwise raises a `UserError` that lists them."""
    if value not in known:
        raise UserError(f"{key}={value!r} is unknown; use one of: {', '.join(known)}")
    return value
