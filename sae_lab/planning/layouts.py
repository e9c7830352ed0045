"""Arrangements of a run's devices, and the cheapest of those that fit."""

from collections.abc import Sequence
from typing import Any, NamedTuple


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

    def overrides(self, lm_devices: Sequence[Any] = ()) -> str:
        """Return the settings of `train` that choose it, with `lm.devices` as given or as those behind the others."""
        n = self.data * self.latents
        lm_devices = lm_devices or range(n, n + self.lm)
        settings = [f"trainer=ddp trainer.devices={n}"] if n > 1 else []
        settings += [f"trainer.shard_latents={self.latents}"] if self.latents > 1 else []
        settings += [f"lm.devices=[{','.join(map(str, lm_devices))}]"] if lm_devices else []
        return " ".join(settings) or "one process"


class Asked(NamedTuple):
    """Numbers of a layout that settings give. None: any."""

    ranks: int | None = None
    """Processes that train: data · latents."""
    latents: int | None = None
    lm: int | None = 0


def layouts(devices: int, shares: int, n_latents: int, asked: Asked) -> list[Layout]:
    """Return the arrangements of at most so many devices, those of the fewest first, and of these the least sharded.

    Args:
        devices: at most.
        shares: a number that the shares of the rows divide: the greatest common divisor of the batch and the text.
        n_latents: a number that the shards of the latents divide.
        asked: what is given. Where nothing is, numbers above FEW are few: of devices for the language model alone
            powers of two, of the others the largest between two of these.
    """
    few = asked.ranks is None and asked.latents is None
    found, of_rows = list[Layout](), divisors(shares, devices, few)
    for m in divisors(n_latents, devices, few):
        for n in of_rows:
            free = devices - n * m
            if free < 0 or asked.ranks not in (None, n * m) or asked.latents not in (None, m):
                continue
            lms = [0, *(2**i for i in range(free.bit_length()))] if asked.lm is None else [asked.lm]
            found += [Layout(n, m, lm) for lm in lms if lm <= free]
    return sorted(found, key=lambda one: (one.devices, one.latents, one.lm))


FEW = 16
"""Numbers of devices up to which every divisor is tried."""


def divisors(n: int, most: int, few: bool = False) -> list[int]:
    """Return the divisors of n up to `most`; if `few`, above FEW the largest of those between two powers of two."""
    found = [i for i in range(1, min(n, most) + 1) if n % i == 0]
    return [*{i if i <= FEW or not few else FEW + i.bit_length(): i for i in found}.values()]


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
    overrides: str = ""
    """The settings of `train` that choose it."""

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


SAME = 1.1
"""Costs or times that differ by less than this factor are alike."""


def cheapest(options: Sequence[Option]) -> Option:
    """Return the option with the fewest device-hours; of those of about as many the fastest.

    Of those that are about as fast, it is the one with the fewest shards of the latents.
    """
    least = min(option.device_hours for option in options)
    alike = [option for option in options if option.device_hours <= SAME * least]
    hours = min(option.hours for option in alike)
    fast = [option for option in alike if option.hours <= SAME * hours]
    return min(fast, key=lambda option: (option.layout.latents, option.hours, option.layout.devices))


def fastest(options: Sequence[Option]) -> Option:
    """Return the option with the fewest hours; of those of about as many the one with the fewest device-hours."""
    hours = min(option.hours for option in options)
    return min((option for option in options if option.hours <= SAME * hours), key=lambda option: option.device_hours)
