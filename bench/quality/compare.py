"""Train the same SAEs with this project and with other libraries on the same rows, and judge them alike.

    python bench/quality/compare.py --peers .peers/bin/python

Run with the project's Python; see README.md for the peers' environment. Writes results.csv and prints a table. A
stopped comparison continues: what is in --work is not made again.
"""

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def run(*command: object) -> None:
    print("+", *command, flush=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run([str(part) for part in command], check=True, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT)


def train_ours(args: argparse.Namespace, rate: str, seed: int, common: list[str], folder: Path) -> None:
    """Train this project's SAEs by its own command: at its defaults, or at the rate and schedule of the peers.

    Its default normalisation gives x_hat the mean and the norm of each row, which no peer has; so every SAE is trained
    with one constant for all rows, and at its defaults as it comes as well.
    """
    if rate == "default":
        settings = [*args.ours, f"sae.normalize={args.normalize}"]
    else:
        settings = [f"optimizer.lr={rate}", "schedule=warmup_decay", f"sae.normalize={args.normalize.split(',')[-1]}"]
    sweep = [f"sae={','.join(args.families)}", "hydra/launcher=shared_stream", f"hydra.sweep.dir={folder}"]
    run(sys.executable, "-m", "sae_lab.train", "-m", *common, *settings, *sweep)


def compare(args: argparse.Namespace, seed: int) -> Path:
    """Compare on the rows of one seed. Returns the csv file."""
    n_tokens = args.steps * args.batch_size
    common = [f"seed={seed}", f"n_tokens={n_tokens}", f"batch_size={args.batch_size}", *args.data]
    work = (args.work / f"{n_tokens}-{seed}").absolute()
    rows, codes = work / "rows", work / "codes"
    if not (rows / "train.npy").is_file():
        run(sys.executable, HERE / "rows.py", "--folder", rows, "--held-out", args.held_out, *common)
    sizes = [f"k={args.k}", f"n_latents={args.n_latents}"]
    for rate in args.rates:
        train_ours(args, rate, seed, [*common, *sizes, "data.n_eval_tokens=1024"], work / "ours" / rate)
        run(
            sys.executable,
            HERE / "ours.py",
            "--runs",
            work / "ours" / rate,
            "--rate",
            rate,
            "--rows",
            rows,
            "--out",
            codes,
        )
    same = ["--n-latents", args.n_latents, "--k", args.k, "--batch-size", args.batch_size, "--seed", seed]
    run(args.peers, HERE / "peers.py", "--rows", rows, "--out", codes, "--families", *args.families, "--rates",
        *args.rates, "--systems", *args.systems, *same)  # fmt: skip
    run(sys.executable, HERE / "judge.py", "--rows", rows, "--codes", codes, "--csv", work / "results.csv", *common)
    return work / "results.csv"


def join(files: list[Path], target: Path) -> None:
    tables = [list(csv.reader(file.open())) for file in files]
    with target.open("w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([tables[0][0], *(row for table in tables for row in table[1:])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="Python of the peers' environment")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "quality", help="folder for rows and SAEs")
    parser.add_argument("--csv", type=Path, default=HERE / "results.csv")
    parser.add_argument("--steps", type=int, default=1953, help="training batches; 1953 of 1024 are 2 M tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rates", nargs="+", default=["default", "1e-3", "3e-3"], help="default, or a learning rate")
    parser.add_argument("--families", nargs="+", default=["topk", "batch_topk", "matryoshka", "jumprelu"])
    parser.add_argument("--systems", nargs="+", default=["SAELens", "dictionary_learning", "sparsify"])
    parser.add_argument("--n-latents", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--held-out", type=int, default=32_768, help="held-out tokens")
    parser.add_argument("--normalize", default="per_token,constant_norm", help="this project's; the last at --rates")
    parser.add_argument("--ours", nargs="*", default=[], help="settings of this project besides its defaults")
    parser.add_argument("--data", nargs="*", default=[], help="settings of model and text, such as lm=gpt2")
    args = parser.parse_args()
    join([compare(args, seed) for seed in args.seeds], args.csv)
    run(sys.executable, HERE / "table.py", args.csv)


if __name__ == "__main__":
    main()
