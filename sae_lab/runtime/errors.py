"""What ends a run on purpose: a user's mistake, told in one sentence that names the fix, and a signal."""


class UserError(Exception):
    """A mistake in the input (a key, a path, a site, a file); entry points print its one sentence and no traceback."""


class Busy(UserError):
    """A run folder in which another process trains."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; a checkpoint was saved first. The exit code is the shell's for that signal.

    Like KeyboardInterrupt no Exception: a sweep must not take it for the failure of one job and start the next.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


def first_line(error: BaseException) -> str:
    """The first line of what another library's error says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
