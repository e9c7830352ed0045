"""Exceptions that end a run on purpose: a user's mistake, told in one sentence that names the fix, and a signal."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in the input (a key, a path, a site, a file). Entry points print its message without a traceback."""


class SettingError(UserError):
    """A mistake in a setting; `{name}` in the sentence stands for the key of the argument `name`.

    `SettingError("{k}=0 must be above 0.")` reads `k=0 must be above 0.` in Python, and `sae.inner.k=0 must be above
    0.` once it is `under` sae.inner. Whoever knows the config also gives it `typed`: the key that the user types in
    place of another, such as k for sae.k where the config says `k: ${k}`.
    """

    def __init__(self, sentence: str):
        super().__init__(sentence)
        self.sentence, self.parent, self.typed = sentence, "", dict[str, str]()

    def under(self, parent: str) -> "SettingError":
        """The same error, about the settings of `parent`."""
        self.parent = join_keys(parent, self.parent)
        return self

    def key(self, name: str) -> str:
        """The key of an argument, as the user types it."""
        key = join_keys(self.parent, name)
        while key in self.typed:
            key = self.typed[key]
        return key

    def __str__(self) -> str:
        return re.sub(r"\{(\w+)\}", lambda name: self.key(name[1]), self.sentence)


class FolderInUse(UserError):
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


def join_keys(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent and name else parent or name


@contextmanager
def settings_under(parent: str) -> Iterator[None]:
    """Raise the setting errors from inside as errors about the settings of `parent`, unknown and missing ones too."""
    try:
        yield
    except SettingError as e:
        e.under(parent)
        raise
    except TypeError as e:
        if (wrong := argument_error(e)) is None:
            raise
        raise wrong.under(parent) from e


@contextmanager
def settings_typed(typed: Mapping[str, str]) -> Iterator[None]:
    """Raise the setting errors from inside with the keys that the user types."""
    try:
        yield
    except SettingError as e:
        e.typed |= typed
        raise


def argument_error(error: BaseException) -> SettingError | None:
    """A call with an unknown or a missing argument, as a setting error; None for any other error."""
    said = str(error) if isinstance(error, TypeError) else ""
    if unknown := re.search(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", said):
        return SettingError(
            f"{{{unknown[2]}}} is not a setting of {unknown[1]} ({{_target_}}): remove it, or correct its name."
        )
    if missing := re.search(r"missing \d+ required .*arguments?: '(\w+)'", said):
        return SettingError(f"{{{missing[1]}}} has no value: give {{{missing[1]}}}=...")
    return None
