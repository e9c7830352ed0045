"""Arrangements of a run's devices, and the cheapest of those that fit."""

from collections.abc import Iterator
from typing import NamedTuple


class Layout(NamedTuple):
    """Devices of a run: data · latents that train, and `lm` that run the language model alone (0: those that train)."""

    data: int = 1
    latents: int = 1
    lm: int = 0

    @property
    def devices(self) -> int:
        return self.data * self.latents + self.lm

    def __str__(self) -> str:
        own = f" + {self.lm} lm" if self.lm else ""
        return f"{self.data} x {self.latents}{own}"

    def overrides(self) -> str:
        """Return the settings of `train` that choose it."""
        n = self.data * self.latents
        settings = [f"trainer=ddp trainer.devices={n}"] if n > 1 else []
        settings += [f"trainer.shard_latents={self.latents}"] if self.latents > 1 else []
        settings += [f"lm.devices=[{','.join(map(str, range(n, n + self.lm)))}]"] if self.lm else []
        return " ".join(settings) or "(one process)"


def layouts(devices: int, batch_size: int, n_tokens: int, n_latents: int, lm_alone: bool) -> Iterator[Layout]:
    """Yield the arrangements of at most so many devices into which batch, text and latents divide.

    Of devices for the language model alone, numbers that are powers of two.
    """
    for n in range(1, devices + 1):
        for m in (m for m in range(1, n + 1) if n % m == 0):
            if n_latents % m or batch_size % n or n_tokens % n:
                continue
            yield Layout(n // m, m)
            for lm in (2**i for i in range((devices - n).bit_length()) if lm_alone):
                yield Layout(n // m, m, lm)


class Option(NamedTuple):
    """A layout with what it takes."""

    layout: Layout
    memory: dict[str, float]
    """Of a device that trains, by what takes it."""
    lm_memory: dict[str, float]
    """Of a device that runs the language model alone; empty if there is none."""
    stages: dict[str, float]
    """Seconds per token of each stage of the run, on all devices together."""
    seconds_per_token: float
    hours: float
    shared_memory: bool = False
    """Whether all processes take from one memory, as on a CPU."""

    @property
    def peak(self) -> float:
        """Bytes of the memory that holds most."""
        n = self.layout.devices if self.shared_memory else 1
        return n * max(sum(self.memory.values()), sum(self.lm_memory.values()))

    @property
    def device_hours(self) -> float:
        return self.hours * self.layout.devices

    @property
    def limit(self) -> str:
        """The stage that takes longest."""
        return max(self.stages, key=lambda name: self.stages[name])


SAME_COST = 1.1
"""Of options whose device-hours differ by less than this factor, the one with the fewest hours is chosen."""


def cheapest(options: list[Option], memory: float) -> Option | None:
    """Return the option that fits with the fewest device-hours, and of those of about as many the fastest."""
    fits = [option for option in options if option.peak <= memory]
    if not fits:
        return None
    least = min(option.device_hours for option in fits)
    alike = [option for option in fits if option.device_hours <= SAME_COST * least]
    return min(alike, key=lambda option: (option.hours, option.layout.devices))
