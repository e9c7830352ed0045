"""Two hosts: network namespaces joined by a cable where this machine lets us make them, else this host's loopback."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Host:
    """A host of the two.

    Attributes:
        number: 0 or 1; the processes of host 0 find those of host 1 at its address.
        namespace: None on the loopback.
        address: of host 0.
    """

    number: int
    namespace: str | None
    address: str

    def enter(self) -> None:
        """Move this process to the host."""
        if self.namespace is not None:
            with Path(f"/run/netns/{self.namespace}").open() as file:
                assert ctypes.CDLL(None).setns(file.fileno(), CLONE_NEWNET) == 0

    def fall_silent(self) -> None:
        """Cut the cable, or stop the calling process where there is none."""
        if self.namespace is None:
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            self.mend("down")

    def mend(self, state: str = "up") -> None:
        """Plug the cable in again."""
        if self.namespace is not None:
            ip("-n", self.namespace, "link", "set", "cable", state)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def make(names: list[str]) -> None:
    for name in names:
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
    ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
    for i, name in enumerate(names):
        ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "cable")
        ip("-n", name, "link", "set", "cable", "up")


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    names = [f"sae{os.getpid()}{i}" for i in "ab"]
    try:
        make(names)
        hosts = [Host(i, name, "10.77.0.1") for i, name in enumerate(names)]
    except (OSError, subprocess.CalledProcessError):  # there is no `ip`, or it may not
        hosts = [Host(i, None, "127.0.0.1") for i in range(2)]
    try:
        yield hosts
    finally:
        for name in names:
            with suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "del", name)
