"""The marker `process`: on every test that starts a process, and on no other. `make test-fast` leaves these out.

A process that imports torch and Lightning costs seconds of a core. The guard fails a test that starts one without being
marked, so the marks stay true.
"""

import multiprocessing.process
import os
import subprocess

import pytest

_allowed = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    global _allowed
    _allowed = item.get_closest_marker("process") is not None
    try:
        return (yield)
    finally:
        _allowed = True


def _guarded(start, is_python):
    def starting(self, *args, **kwargs):
        if not _allowed and is_python(args):
            raise AssertionError("this test starts a process: mark it with @pytest.mark.process")
        return start(self, *args, **kwargs)

    return starting


def _runs_python(arguments: tuple) -> bool:
    """Whether a Popen's command is a Python; git and compilers are quick."""
    command = arguments[0] if arguments else []
    program = command if isinstance(command, str) else command[0] if len(command) else ""
    return "python" in os.path.basename(str(program))  # noqa: PTH119 (may be bytes or a path)


subprocess.Popen.__init__ = _guarded(subprocess.Popen.__init__, _runs_python)
multiprocessing.process.BaseProcess.start = _guarded(multiprocessing.process.BaseProcess.start, lambda _: True)
