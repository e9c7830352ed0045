"""Kill runs anywhere and start them again until they are done: `python tests/kill_anywhere.py runs=20 seed=0`.

Every run must end with the bits of one that was never stopped: parameters, buffers, optimizer state, place in the
stream, metrics.json and SAE file. Its training log may lack a row (where it was stopped between a checkpoint and the
log of the same step) but hold none that the other does not. Runs take turns in data (from a store of tokens; the same,
which the run itself builds; windows of a stream; cached; chats, from a store and streamed; token ids), prefetch (on,
off), signal (SIGKILL, SIGTERM, SIGINT) and place: any moment, or within the tokenizing, a refill of the block, the
reading of a window, the writing of a checkpoint, a validation, the calibration, the evaluation; or the process that
reads windows is killed instead. Runs are forked from a server that has imported all, so that most of their time is
work.
"""

import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from shell import fork
from transformers import AutoTokenizer

import sae_lab.evaluate
import sae_lab.harvest
import sae_lab.lm
import sae_lab.train
import sae_lab.training.run
import sae_lab.training.trainer
from sae_lab.activations.buffer import ShuffledBlocks
from sae_lab.activations.data import ActivationData
from sae_lab.text import store_builder, window_rows
from sae_lab.text.bundled import StdlibDocuments
from sae_lab.text.store_builder import StoreBuilder
from sae_lab.text.window_reader import ReaderProcess

SHARED = ["seq_len=32"]
TINY = [
    *("n_tokens=6_144", "batch_size=128", "expansion=2", "k=8", "data.block_tokens=1_024", "data.lm_batch_rows=8"),
    *("data.n_eval_tokens=1_024", "data.n_val_tokens=512", "calibration_batches=3", "trainer.validate_every=10"),
    *("trainer.checkpoint_every=7", "trainer.log_every=3", "trainer=cpu", "lm.device=cpu"),
]
PLACES: dict[str, tuple[Any, str, int]] = {  # where it is called, its name, and how often about it is called in a run
    "tokenizing": (StoreBuilder, "_append", 12),
    "refill": (ShuffledBlocks, "_refill", 7),
    "window": (ReaderProcess, "request", 3),
    "reader": (ReaderProcess, "request", 3),
    "checkpoint": (sae_lab.training.checkpoint_io.AtomicCheckpointIO, "save_checkpoint", 8),
    "validation": (ActivationData, "val_dataloader", 1),
    "calibration": (sae_lab.training.run, "calibrate", 1),
    "evaluation": (sae_lab.training.run, "evaluate_all", 1),
}


KINDS = ("streamed", "store", "window", "cached", "chats", "stream of chats", "tokens")
PLACES_OF_KINDS = {
    "store": ["tokenizing"],
    "chats": ["tokenizing"],
    "tokens": ["tokenizing"],
    "window": ["window", "reader"],
}
ANYWHERE = [place for place in PLACES if place not in ("tokenizing", "window", "reader")]


class Kill(NamedTuple):
    """A signal, `delay` seconds after the n-th call of a place, or after the start of the run ("any")."""

    signum: signal.Signals
    place: str
    call: int
    delay: float

    def arm(self) -> None:
        """In the process that is to be killed."""
        if self.place == "any":
            self._after_delay()
            return
        owner, name, _ = PLACES[self.place]
        real: Callable[..., Any] = getattr(owner, name)
        calls = itertools.count(1)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == self.call:
                self._after_delay()
            return real(*args, **kwargs)

        setattr(owner, name, counted)

    def _after_delay(self) -> None:
        timer = threading.Timer(self.delay, self._send)
        timer.daemon = True
        timer.start()

    def _send(self) -> None:
        readers = multiprocessing.active_children() if self.place == "reader" else []
        for pid in [reader.pid for reader in readers] or [os.getpid()]:
            os.kill(pid, self.signum)  # type: ignore[arg-type]


def command(module: str, overrides: list[str], log: Path, kill: Kill | None, cache: str | None) -> None:
    """The body of a forked process: an entry point, as the shell would start it."""
    if cache is not None:
        os.environ["SAE_LAB_CACHE"] = cache
    store_builder.SAVE_SECONDS, store_builder.TOGETHER = 0.0, 2**20
    window_rows.SMALLEST = 1024
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    main = sys.modules[module].main
    sys.argv = [str(sys.modules[module].__file__), *overrides]
    torch.set_num_threads(1)
    if kill is not None:
        kill.arm()
    main()


def start(
    module: Any, overrides: list[str], log: Path, kill: Kill | None = None, cache: str | None = None
) -> BaseProcess:
    # Not a fork of this process: one that has used CUDA cannot be forked.
    return fork(command, module.__name__, overrides, log, kill, cache)


def run_to_end(
    overrides: list[str],
    log: Path,
    kills: list[Kill] = (),  # type: ignore[assignment]
    cache: str | None = None,
) -> list[int]:
    """Start, be killed, start again, ... until a start is not killed; the exit codes, the last one 0."""
    codes: list[int] = []
    for kill in [*kills, None]:
        process = start(sae_lab.train, overrides, log, kill, cache)
        process.join()
        assert process.exitcode is not None
        codes.append(process.exitcode)
        if process.exitcode == 0:  # the kill came too late: the run is complete
            return codes
    raise AssertionError(f"{overrides}: exit code {codes[-1]}\n{log.read_text()[-3000:]}")


def result(folder: Path) -> dict[str, Any]:
    """All that must be the same."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    log = pd.read_csv(folder / "metrics.csv").drop(columns="tokens_per_second", errors="ignore")
    rows = {repr(row) for row in log[sorted(log)].itertuples(index=False)}
    return {key: checkpoint[key] for key in kept} | {
        "place": checkpoint.get("ActivationData") or checkpoint["CachedData"],
        "metrics.json": (folder / "metrics.json").read_bytes(),
        "sae.safetensors": (folder / "sae" / "sae.safetensors").read_bytes(),
        "metrics.csv": rows,
    }


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of what is not equal to the bit, in nested containers of tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{name}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for key in a for d in differences(a[key], b[key], f"{name}/{key}")]
    if isinstance(a, list | tuple):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{name}/{i}")]
    if isinstance(a, set):
        return [] if b <= a else [f"{name}: {sorted(b - a)}"]
    return [] if a == b else [name]


def some_kills(rng: random.Random, data: str, i: int, seconds: float) -> list[Kill]:
    """One kill at a place that takes its turn, then up to two at any moment."""
    signals = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    places = [*PLACES_OF_KINDS.get(data, []), "any", *ANYWHERE]
    place = places[i % len(places)]
    calls = 1 if place == "any" else PLACES[place][2]
    first = Kill(rng.choice(signals), place, rng.randint(1, calls), rng.uniform(0, seconds if place == "any" else 0.05))
    more = [Kill(rng.choice(signals), "any", 1, rng.uniform(0, seconds)) for _ in range(rng.randint(0, 2))]
    return [first, *more]


class Grounds:
    """A folder with a cache and an uninterrupted run of each kind of data."""

    def __init__(self, folder: Path):
        self.folder = folder
        cache = [*SHARED, "n_tokens=4_000", "shard_tokens=1_000", "data.lm_batch_rows=8", "lm.device=cpu"]
        process = start(sae_lab.harvest, [*cache, f"cache_dir={folder}/cache"], folder / "harvest.log")
        process.join()
        assert process.exitcode == 0, (folder / "harvest.log").read_text()
        self.whole: dict[str, dict[str, Any]] = {}
        write_chats_and_tokens(folder)
        for data in ("streamed", "cached", "window"):
            self.finish_whole(data)
        self.whole["store"] = self.whole["streamed"]

    def finish_whole(self, data: str) -> None:
        """Make the uninterrupted run of a kind of data, if there is none yet."""
        if data not in self.whole:
            begun = time.perf_counter()
            run_to_end(self.overrides(data, False, f"whole-{data}"), self.folder / "whole.log")
            self.seconds = time.perf_counter() - begun
            self.whole[data] = result(self.folder / f"whole-{data}")

    def overrides(self, data: str, prefetch: bool, name: str) -> list[str]:
        source = {
            "cached": ["data=cached", f"data.path={self.folder}/cache"],
            "window": ["data._target_=pages.stdlib_in_pages", "+data.window_tokens=2_048"],
            "chats": ["data=text_files", f"data.paths=[{self.folder}/chats]", f"lm.tokenizer={self.folder}/tokenizer"],
            "stream of chats": [
                *("data=hub", f"data.path={self.folder}/chats", f"lm.tokenizer={self.folder}/tokenizer"),
                *("data.held_out_documents=4", "data.window_tokens=2_048"),
            ],
            "tokens": ["data=tokens", f"data.paths=[{self.folder}/tokens.bin]"],
        }.get(data, [])
        return [
            *source,
            *SHARED,
            *TINY,
            f"data.prefetch={str(prefetch).lower()}",
            f"hydra.run.dir={self.folder}/{name}",
        ]

    def kill(self, name: str, data: str, prefetch: bool, kills: list[Kill]) -> tuple[list[int], list[str]]:
        """Exit codes of one run's starts, and what of it is not as in the uninterrupted one."""
        self.finish_whole(data)
        cache = f"{self.folder}/{name}-tokens" if "tokenizing" in PLACES_OF_KINDS.get(data, []) else None
        codes = run_to_end(self.overrides(data, prefetch, name), self.folder / f"{name}.log", kills, cache)
        return codes, differences(self.whole[data], result(self.folder / name))


def write_chats_and_tokens(folder: Path) -> None:
    """Write a folder of chats, the tiny model's tokenizer with a chat template, and a file of token ids."""
    tokenizer = AutoTokenizer.from_pretrained(Path(sae_lab.lm.__file__).parent / "tiny")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '## ' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    modules = StdlibDocuments().batch(range(40))
    texts = [text[i : i + 1_000] for text in modules for i in range(0, 9_000, 1_000) if text[i:]]
    turns = [[{"from": "human", "value": a}, {"from": "gpt", "value": b}] for a, b in itertools.pairwise(texts)]
    (folder / "chats").mkdir()
    lines = [json.dumps({"id": f"conv_{i}", "conversations": chat}) for i, chat in enumerate(turns)]
    (folder / "chats" / "train.jsonl").write_text("\n".join(lines))
    ids = [[*own, tokenizer.eos_token_id] for own in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    np.array(list(itertools.chain(*ids)), "<u2").tofile(folder / "tokens.bin")


def main(runs: int = 20, seed: int = 0) -> int:
    """A line a run; the number of runs that differ."""
    rng, failures, stops = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        grounds = Grounds(Path(folder))
        print(f"an uninterrupted run takes {grounds.seconds:.1f} s", flush=True)
        for i in range(runs):
            data, prefetch = KINDS[i % len(KINDS)], bool(i // len(KINDS) % 2)
            kills = some_kills(rng, data, i // len(KINDS), grounds.seconds)
            codes, different = grounds.kill(f"run-{i}", data, prefetch, kills)
            failures, stops = failures + bool(different), stops + len([c for c in codes if c])
            planned = ", ".join(f"{k.signum.name} {k.place} {k.call} +{k.delay:.2f} s" for k in kills)
            verdict = f"DIFFERS in {different}" if different else "the same bits"
            print(f"{i:3} {data:8} prefetch={prefetch!s:5} {planned}: exit codes {codes}: {verdict}", flush=True)
    print(json.dumps({"runs": runs, "stops": stops, "different": failures}))
    return failures


if __name__ == "__main__":
    arguments = dict(argument.split("=") for argument in sys.argv[1:])
    sys.exit(main(**{name: int(value) for name, value in arguments.items()}) > 0)
