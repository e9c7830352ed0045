"""Exceptions that end a run on purpose: a user's mistake, told in one sentence that names the fix, and a signal."""


class UserError(Exception):
    """A mistake in the input (a key, a path, a site, a file). Entry points print its message without a traceback."""


class Busy(UserError):
    """Another process is training in the run folder."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM stopped the run, after a checkpoint was saved. The exit code is 128 + the signal's number.

    Not an Exception, like KeyboardInterrupt, so that a sweep does not record a failed job and start the next.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
