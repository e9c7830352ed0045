"""Plan runs and measure them: `python bench/plan/runs.py [case ...]` prints memory and hours, measured and planned.

For each case the stages are measured first (`throughput`), then the run is planned by them and started, so that load on
the machine slows both. Memory is the peak of the anonymous memory of the process that has most; pages of mapped files
are not counted, since the system may take them back.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil

SHORT = ["data.n_eval_tokens=4096", "calibration_batches=10"]
MACHINE = ["machine=cpu2", "trainer.accelerator=cpu"]


class Case(NamedTuple):
    """A run: its overrides, and those that `train` and `plan` have besides."""

    overrides: list[str]
    multirun: bool = False
    gpus: int = 1
    cached: bool = False


CASES = {
    "tiny": Case(["n_tokens=1_048_576", *SHORT]),
    "131k latents": Case(["n_tokens=65_536", "n_latents=131072", "sae.auxk_coefficient=0", *SHORT]),
    "cached": Case(["n_tokens=1_048_576", *SHORT], cached=True),
    "group": Case(["n_tokens=524_288", "k=8,16", "expansion=8,16", *SHORT], multirun=True),
    "ddp": Case(["n_tokens=524_288", "trainer=ddp", "trainer.devices=2", *SHORT], gpus=2),
}


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"sae_lab.{module}", *arguments]


def call(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr}")


def anonymous(pid: int) -> float:
    """Return the largest anonymous memory of a process and its children, in bytes."""
    found = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    kilobytes = [re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{p.pid}/status").read_text()) for p in found]
    return max((1024.0 * int(line[1]) for line in kilobytes if line), default=0.0)


def watch(arguments: list[str]) -> tuple[float, float]:
    """Run a command. Returns its peak memory in bytes and its seconds."""
    start, peaks = time.perf_counter(), [0.0]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(arguments, stdout=said, stderr=said)
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(0.05):
                try:
                    peaks.append(anonymous(process.pid))
                except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
                    continue  # a process that has just ended: the next sample is without it

        thread = threading.Thread(target=sample)
        thread.start()
        code = process.wait()
        seconds = time.perf_counter() - start
        ended.set()
        thread.join()
        if code:
            said.seek(0)
            raise SystemExit(f"{' '.join(arguments)}\n{said.read()[-3000:]}")
    return max(peaks), seconds


def measure(name: str, case: Case, folder: Path) -> tuple[float, float, float, float]:
    """Return the memory and the seconds of a case, measured and planned."""
    one = [o.split(",")[0] for o in case.overrides if not o.startswith(("trainer", "calibration", "data.n_eval"))]
    rates = [*(o for o in one if not o.startswith("n_tokens")), "slice_tokens=32_768", "slices=5"]
    call(command("throughput", *rates, f"hydra.run.dir={folder / 'rates'}"))
    overrides = list(case.overrides)
    if case.cached:
        call(command("harvest", "n_tokens=1_048_576", "data.n_eval_tokens=16_384", f"cache_dir={folder / 'cache'}"))
        overrides += ["data=cached", f"data.path={folder / 'cache'}"]
    launcher = ["-m", "hydra/launcher=shared_stream", f"hydra.sweep.dir={folder / 'run'}"] if case.multirun else []
    own = launcher or [f"hydra.run.dir={folder / 'run'}"]
    memory, seconds = watch(command("train", *own, *overrides, "trainer.accelerator=cpu"))
    call(
        command(
            "plan",
            *launcher[:2],
            *overrides,
            *MACHINE,
            f"gpus={case.gpus}",
            f"rates=[{folder / 'rates'}]",
            f"out={folder / 'plan.json'}",
        )
    )
    plan = json.loads((folder / "plan.json").read_text())
    chosen = plan["streams"][0]["chosen"]
    return memory, seconds, sum(chosen["memory"].values()), 3600 * chosen["hours"]


def main() -> None:
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    print("| run | GB measured | planned | | s measured | planned | |\n|---|---|---|---|---|---|---|", flush=True)
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            memory, seconds, planned, expected = measure(name, CASES[name], Path(folder))
        print(
            f"| {name} | {memory / 1e9:.2f} | {planned / 1e9:.2f} | {planned / memory - 1:+.0%} "
            f"| {seconds:.0f} | {expected:.0f} | {expected / seconds - 1:+.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
