"""Name the part of a mixture that is being read, in messages of code that knows of no mixture."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from sae_lab.runtime.errors import SettingError, UserError, settings_under

_part = ContextVar("part", default="")


@contextmanager
def reading_part(key: str) -> Iterator[None]:
    """Let log lines and errors from inside name the part of this key, such as `parts.code`."""
    token = _part.set(f"data.{key}")
    try:
        with settings_under(key):
            yield
    except SettingError:
        raise
    except UserError as e:
        raise UserError(f"data.{key}: {e}") from e
    finally:
        _part.reset(token)


def part_prefix() -> str:
    """Return `data.parts.code: ` while that part of a mixture is read, otherwise nothing."""
    return f"{part}: " if (part := _part.get()) else ""


def part_or(whole: str) -> str:
    """Return `data.parts.code` while that part of a mixture is read, otherwise `whole`."""
    return _part.get() or whole
