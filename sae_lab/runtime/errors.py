"""Exceptions that end a run on purpose: a user's mistake, reported in one sentence that names the fix, or a signal."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in the input (a key, a path, a site, a file). Entry points print its message without a traceback."""


class SettingError(UserError):
    """A mistake in a setting. `{name}` in the sentence stands for the full key of the argument `name`; `{{` is a brace.

    `SettingError("{k}=0 must be above 0.")` reads `k=0 must be above 0.` in Python. After `under("sae.inner")` it reads
    `sae.inner.k=0 must be above 0.` Code that knows the config also sets `typed`: it maps a key to the one that the
    user types instead, such as sae.k to k if the config has `k: ${k}`.
    """

    def __init__(self, sentence: str):
        super().__init__(sentence)
        self.sentence, self.parent, self.typed = sentence, "", dict[str, str]()

    def under(self, parent: str) -> "SettingError":
        """Prefix the keys in the sentence with `parent`, in place, and return the error."""
        self.parent = join_keys(parent, self.parent)
        return self

    def key(self, name: str) -> str:
        """Return the full key of an argument, as the user types it."""
        key = join_keys(self.parent, name)
        while key in self.typed:
            key = self.typed[key]
        return key

    def __str__(self) -> str:
        return re.sub(r"\{\{|\}\}|\{(\w+)\}", lambda m: self.key(m[1]) if m[1] else m[0][0], self.sentence)


class FolderInUse(UserError):
    """Another process is training in the run folder."""


class Interrupted(BaseException):
    """A signal stopped the command. The exit code is 128 + the signal's number.

    Not an Exception, like KeyboardInterrupt, so that a sweep does not record a failed job and start the next.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum


class SafeStop(Interrupted):
    """An interruption raised where nothing is half done, so that the state can be saved."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def join_keys(parent: str, name: str) -> str:
    """Join two keys with a dot; either may be empty."""
    return f"{parent}.{name}" if parent and name else parent or name


@contextmanager
def settings_under(parent: str) -> Iterator[None]:
    """Prefix the keys in setting errors raised inside with `parent`.

    TypeErrors about unknown or missing arguments become setting errors as well.
    """
    try:
        yield
    except SettingError as e:
        e.under(parent)
        raise
    except TypeError as e:
        if (setting_error := argument_error(e)) is None:
            raise
        raise setting_error.under(parent) from e


@contextmanager
def report_typed_keys(typed: Mapping[str, str]) -> Iterator[None]:
    """Let setting errors raised inside name the keys that the user types (see SettingError)."""
    try:
        yield
    except SettingError as e:
        e.typed |= typed
        raise


def argument_error(error: BaseException) -> SettingError | None:
    """Return a SettingError for a TypeError about an unknown or missing argument; None for any other error."""
    message = str(error) if isinstance(error, TypeError) else ""
    if unknown := re.search(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", message):
        return SettingError(
            f"{{{unknown[2]}}} is not a setting of {unknown[1]} ({{_target_}}): remove it, or correct its name."
        )
    if missing := re.search(r"missing \d+ required .*arguments?: '(\w+)'", message):
        return SettingError(f"{{{missing[1]}}} has no value: give {{{missing[1]}}}=...")
    return None
