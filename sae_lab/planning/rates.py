"""Seconds of each stage at any size: formulas of work, fitted to what was measured.

A stage takes a sum of terms, each an amount of work times the seconds of a unit of it:

    forward of the language model     multiplications · 2, and bytes that its blocks read and write
    training step                     multiplications · 2, bytes of parameters and of gathered rows, and once per step

The seconds of a unit are those that leave the least squares of relative errors at the measured sizes, and are not less
than the machine's `peak` allows.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_lab.planning.sizes import LMSize, Reading, SAESize, read_sizes, sae_size
from sae_lab.runs.trust import check_trusted
from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.runtime.files import read_json

BLOCK_BYTES = 64
"""Bytes that a block reads and writes for each number of an activation: some 16 numbers of 4 bytes."""
PASSES = 6
"""Times that a step gathers the rows of active entries: decoding, and the gradients of z, W_dec, W_enc and x."""
PARAMETER_BYTES = 28
"""Bytes that a step moves for each parameter: the product reads it; Adam reads parameter, gradient and two moments,
and writes three of them."""
FILES = ("throughput.json", "benchmark.json")


class Fit(NamedTuple):
    """Seconds of a unit of each term, a factor by which a machine of the same kind is slower, and the least seconds."""

    seconds: tuple[float, ...]
    factor: float = 1.0
    least: tuple[float, ...] = ()

    def __call__(self, terms: Sequence[float]) -> float:
        return self.factor * sum(a * b for a, b in zip(self.seconds, terms, strict=True))

    def through(self, terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> "Fit":
        """Return the fit of these measurements: a new one if there are as many as terms, else this one, scaled."""
        if not seconds:
            return self
        if len(seconds) >= len(self.seconds):
            return fit(terms, seconds, self.least)
        ratios = [y / self(x) for x, y in zip(terms, seconds, strict=True)]
        return self._replace(factor=self.factor * float(np.exp(np.mean(np.log(ratios)))))


def fit(terms: Sequence[Sequence[float]], seconds: Sequence[float], least: Sequence[float] = ()) -> Fit:
    """Return the seconds of a unit of each term with the least squares of relative errors.

    Args:
        terms: the work at each measured size.
        seconds: what it took.
        least: the least seconds of a unit; 0 for those that are not given.
    """
    n_terms = len(terms[0])
    floor = np.array([*least, *[0.0] * (n_terms - len(least))])
    A = np.array(terms, dtype=float) / np.array(seconds, dtype=float)[:, None]
    rest = 1 - A @ floor
    best, error = floor, float((rest**2).sum())
    for n in range(1, n_terms + 1):
        for chosen in combinations(range(n_terms), n):
            columns = A[:, chosen]
            scale = columns.max(axis=0)  # operations are 1e12 and steps are 1
            more = np.linalg.lstsq(columns / scale, rest, rcond=None)[0] / scale
            left = float(((columns @ more - rest) ** 2).sum())
            if (more >= 0).all() and left < error - 1e-9:
                best, error = floor.copy(), left
                best[list(chosen)] += more
    return Fit(tuple(best.tolist()), least=tuple(floor.tolist()))


def forward_terms(parameters: float, d: int, n_layers: float) -> tuple[float, float]:
    """Return the work of the language model on one token: operations, and bytes of activations."""
    return 2 * parameters, BLOCK_BYTES * d * n_layers


def step_terms(
    b: float, read: int, written: int, n_latents: float, parameters: float, k: float, sparse: bool
) -> tuple[float, ...]:
    """Return the work of a training step: operations, bytes, and 1.

    With codes by active entry there is one product, whose result (b, f) the selection reads twice, and rows are
    gathered for each of the b·k entries. Otherwise there are five products and much work on matrices (b, f): counted as
    a sixth product and eight passes, the measured steps of conf/machine/cpu2.yaml are met within 17 %.

    Args:
        read, written: numbers of a row that a latent is computed from, and that x_hat has.
    """
    width = (read + written) / 2  # of the products, half of which are of the encoder, and so of the rows
    operations = 2 * b * n_latents * (read if sparse else 6 * width)
    entries = b * k * width + 2 * b * n_latents if sparse else 8 * b * n_latents
    return operations, PARAMETER_BYTES * parameters + 4 * PASSES * entries, 1.0


class Rates(NamedTuple):
    """How fast a machine is.

    Args:
        machine: its node of conf/machine.
        forward, step: seconds of the language model per token, and of a training step.
        text, cache_write, cache_read: tokens/s of one process, and bytes/s.
        sources: where these come from.
    """

    machine: DictConfig
    forward: Fit
    step: Fit
    text: float
    cache_write: float
    cache_read: float
    sources: tuple[str, ...]


def rates_of(cfg: DictConfig, known: Mapping[str, Mapping[str, int]]) -> Rates:
    """Return the rates of the machine in a config, corrected by the figures in `rates`.

    Raises:
        SettingError: a file of `rates` holds no figures of `throughput` or `benchmark`.
    """
    m = cfg.machine
    least = (1 / m.peak.operations, 1 / m.peak.bytes)
    rates = Rates(
        m, forward_fit(m.forward, least), step_fit(m.step, least), m.text, m.cache_write, m.cache_read, (m.name,)
    )
    paths = [cfg.rates] if isinstance(cfg.rates, str) else cfg.rates
    measured = [measurement(Path(path), known, [str(cfg.sae.get("_target_"))]) for path in paths]
    return rates if not measured else corrected(rates, measured)._replace(sources=(*map(str, paths),))


def forward_fit(points: Sequence[Mapping[str, float]], least: Sequence[float]) -> Fit:
    terms = [forward_terms(p["parameters"], int(p["d"]), p["n_layers"]) for p in points]
    return fit(terms, [1 / p["tokens_per_second"] for p in points], least)


def step_fit(points: Sequence[Mapping[str, Any]], least: Sequence[float]) -> Fit:
    terms, seconds = transposed([step_point(p, p["ms"]) for p in points])
    return fit(terms, seconds, least)


def step_point(p: Mapping[str, Any], ms: float) -> tuple[tuple[float, ...], float]:
    """Return the work and the seconds of a measured step of a plain SAE."""
    width, f = p["d_in"] * p.get("n_sources", 1), p["n_latents"]
    return step_terms(p["batch_size"], width, width, f, 2 * f * width, p["k"], p["sparse"]), ms / 1e3


def read_figures(path: Path) -> dict[str, Any]:
    """Return the figures that `throughput` or `benchmark` wrote, by their file or their folder."""
    files = [path] if path.is_file() else [path / name for name in FILES if (path / name).is_file()]
    if not files:
        raise SettingError(f"rates={path} is neither throughput.json or benchmark.json nor a folder with one of them.")
    try:
        figures = read_json(files[0])
    except (OSError, ValueError) as e:
        raise no_figures(path) from e
    if not isinstance(figures.get("config"), dict) or "tokens_per_second" not in figures:
        raise no_figures(path)
    return figures


def no_figures(path: Path | str) -> SettingError:
    return SettingError(f"rates={path} holds no figures of throughput or benchmark: give one of their files.")


class Measurement(NamedTuple):
    """Work and seconds that a file has of the language model and of a step, and other rates by their names in Rates."""

    forward: tuple[Any, float] | None
    step: tuple[Any, float]
    others: Mapping[str, float] = {}


def measurement(path: Path, known: Mapping[str, Mapping[str, int]], trust: Sequence[str]) -> Measurement:
    """Read a file of figures.

    Args:
        path: the file or its folder.
        known: see read_sizes.
        trust: classes of SAEs, besides those of this package, of which sizes are counted.

    Raises:
        SettingError: it holds none of `throughput` or `benchmark`, or those of an SAE that is not trusted.
    """
    figures = read_figures(path)
    check_trusted({"sae": figures["config"].get("sae")}, path, trust)
    try:
        found = measured(figures, known)
        seconds = [found.step[1], *([found.forward[1]] if found.forward else []), *found.others.values()]
        if not all(0 < one < float("inf") for one in seconds):
            raise ValueError("a rate of nothing")
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OmegaConfBaseException) as e:
        raise no_figures(path) from e
    return found


def measured(figures: Mapping[str, Any], known: Mapping[str, Mapping[str, int]]) -> Measurement:
    """Return the work and the seconds that figures of `throughput` or `benchmark` hold."""
    cfg, stages = OmegaConf.create(dict(figures["config"])), figures["tokens_per_second"]
    if not isinstance(stages, Mapping):  # of `benchmark`
        return Measurement(None, measured_step(cfg, figures["step_ms"] / 1e3))
    reading = read_sizes(with_lm_size(cfg), known)
    forward = forward_work(reading.lm, reading.n_layers), 1 / stages["forward"]
    step = step_work(sae_size(cfg, reading), cfg.batch_size), cfg.batch_size / stages["step"]
    written, read = (stages[f"cache {x}"] * reading.bytes_per_token for x in ("write", "read"))
    return Measurement(forward, step, {"text": stages["text"], "cache_write": written, "cache_read": read})


def corrected(rates: Rates, measurements: Sequence[Measurement]) -> Rates:
    """Return the rates that agree with measurements."""
    for one in measurements:
        rates = Rates(**(rates._asdict() | dict(one.others)))
    forward = rates.forward.through(*transposed([one.forward for one in measurements if one.forward]))
    return rates._replace(forward=forward, step=rates.step.through(*transposed([one.step for one in measurements])))


def with_lm_size(cfg: Any) -> DictConfig:
    """Return a config with the keys that only `plan` has."""
    merged = OmegaConf.merge({"lm_size": {}, "expansion": None}, cfg)
    assert isinstance(merged, DictConfig)
    return merged


def measured_step(cfg: Any, seconds: float) -> tuple[tuple[float, ...], float]:
    """Return the work and the seconds of a step of `benchmark`."""
    reading = Reading(LMSize(cfg.d_in, 1, 0, 0, 0), 1, cfg.n_sources, 4)
    return step_work(sae_size(with_lm_size(cfg), reading), cfg.batch_size), seconds


def transposed(points: Sequence[tuple[Any, float]]) -> tuple[list[Any], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def forward_work(lm: LMSize, n_layers: float) -> tuple[float, float]:
    return forward_terms(lm.multiplied(n_layers), lm.d, n_layers)


def step_work(sae: SAESize, b: float) -> tuple[float, ...]:
    """Return the work of a training step on b rows."""
    return step_terms(b, sae.read, sae.written, sae.n_latents, sae.parameters, sae.k, sae.sparse)
