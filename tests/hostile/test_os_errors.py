"""What the operating system refuses is one sentence with the path, its reason and what to do; a broken job is a row."""

import errno
import json
import os
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import build
from fitting import fit
from lightning.pytorch.callbacks import ModelCheckpoint
from shell import run
from small_runs import assert_one_sentence

from sae_lab.cli.explain import explain
from sae_lab.runs.checkpoint import check_readable
from sae_lab.runs.tables import read_numbers
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import atomic_file, write_atomically
from sae_lab.runtime.os_errors import REMEDIES, explain_os_error
from sae_lab.sweeps.figures import draw_sweep
from sae_lab.sweeps.search import describe_best
from sae_lab.sweeps.status import all_jobs, job_statuses, planned_jobs
from sae_lab.sweeps.table import collect_table
from sae_lab.training.checkpoint_io import AtomicCheckpointIO
from sae_lab.training.loggers import CSVLog

LONG = "x" * 300
FULL = f"{os.strerror(errno.ENOSPC)}): free some space there"


@pytest.mark.parametrize("number", REMEDIES)
def test_a_refusal_says_the_path_the_reason_and_what_to_do(number):
    error = OSError(number, os.strerror(number), "/some/path")
    sentence = f"/some/path cannot be used ({os.strerror(number)}): {REMEDIES[number]}."
    assert explain_os_error(error) == explain(error, "train", []) == sentence
    caused = ValueError("Unable to configure handler 'file'")
    caused.__cause__ = error
    assert explain(caused, "train", []) == sentence


def test_a_bug_keeps_its_traceback_even_after_a_refusal():
    assert explain(OSError("of a network library"), "train", []) is None
    bug = KeyError("a bug")
    bug.__context__ = PermissionError(errno.EACCES, "Permission denied", "handled")
    assert explain(bug, "train", []) is None


def fill_disk(monkeypatch, after: int = 0) -> None:
    """Let atomic writes after the first few go to a device that is always full."""
    opened, count = Path.open, iter(range(10_000))

    def open_or_fill(path, mode="r", *args, **kwargs):
        is_temporary = path.name.startswith(".") and path.suffix[1:].isdigit()
        full = "w" in mode and is_temporary and next(count) >= after
        return opened(Path("/dev/full") if full else path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_or_fill)


def save_tensors(path: Path) -> None:
    with atomic_file(path) as f:
        torch.save({"a": torch.zeros(10_000)}, f)


@pytest.mark.parametrize("write", [save_tensors, lambda path: write_atomically(path, b"1" * 100_000)])
def test_a_full_disk_keeps_the_file_that_was_there(write, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    fill_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left on device") as refused:
        write(tmp_path / "file")
    assert explain_os_error(refused.value).startswith(f"{tmp_path / 'file'} cannot be used ({FULL}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_disk_that_fills_while_a_checkpoint_is_saved_leaves_the_one_before(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    saving = ModelCheckpoint(folder, "last", every_n_train_steps=3, enable_version_counter=False)
    io = _checkpoint_io(tmp_path)
    fill_disk(monkeypatch, after=2)
    with pytest.raises(OSError, match="No space left on device") as refused:
        fit(build("topk"), callbacks=[saving], enable_checkpointing=True, plugins=[io])
    assert explain(refused.value, "train", []).startswith(f"{folder / 'last.ckpt'} cannot be used ({FULL}")
    monkeypatch.undo()
    assert check_readable(folder / "last.ckpt", "") == 6
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]


def _checkpoint_io(run_dir: Path) -> AtomicCheckpointIO:
    return AtomicCheckpointIO(run_dir)


def test_a_full_disk_names_metrics_csv_and_half_a_line_is_repeated(tmp_path, monkeypatch):
    log = CSVLog(str(tmp_path))
    for step in (0, 10, 20):
        log.log_metrics({"loss": 1.0}, step)
    log.path.write_text(log.path.read_text() + "3")
    resumed = CSVLog(str(tmp_path))
    resumed.log_metrics({"loss": 2.0}, 20)
    assert pd.read_csv(log.path)["step"].tolist() == [0, 10, 20]
    resumed.path = Path("/dev/full")
    with pytest.raises(OSError, match="No space left") as refused:
        resumed.log_metrics({"loss": 2.0}, 30)
    assert explain_os_error(refused.value).startswith(f"/dev/full cannot be used ({FULL}")


DAMAGED_LOGS = {
    "text": b"step,loss\nx,1\n",
    "bytes": b"\xff\xfe\x00\n",
    "other columns": b"a,b\n1,2\n",
    "more": b"step\n1,2\n",
}


@pytest.mark.parametrize("name", DAMAGED_LOGS)
def test_a_damaged_metrics_csv_is_one_sentence_and_no_figure(name, tmp_path, caplog):
    (tmp_path / "metrics.csv").write_bytes(DAMAGED_LOGS[name])
    with pytest.raises(UserError, match=r"metrics\.csv is damaged .*: move it away, then type the same command again"):
        CSVLog(str(tmp_path)).log_metrics({"loss": 1.0}, 5)
    assert (tmp_path / "metrics.csv").read_bytes() == DAMAGED_LOGS[name]
    assert read_numbers(tmp_path / "metrics.csv", ["l0"]) is None
    assert "metrics.csv is left out of the figures" in caplog.text


BAD_FOLDERS = {"below a file": "file/x", "a loop of links": "loop/x", "too long": LONG, "in /proc": "/proc/x/y"}
COMMANDS = {
    "train": ["hydra.run.dir={}"],
    "planted": ["hydra.run.dir={}"],
    "benchmark": ["hydra.run.dir={}"],
    "throughput": ["hydra.run.dir={}"],
    "harvest": ["hydra.run.dir={}", "cache_dir=cache"],
    "evaluate": ["run_dir=.", "hydra.run.dir={}"],
    "features": ["run_dir=.", "hydra.run.dir={}"],
    "report": ["sweep_dir=.", "hydra.run.dir={}"],
    "export": ["run_dir=.", "hydra.run.dir={}"],
}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


@pytest.mark.process
@pytest.mark.parametrize("module", COMMANDS)
def test_a_folder_that_hydra_cannot_make_is_one_sentence(module, folder):
    bad = list(BAD_FOLDERS.values())[list(COMMANDS).index(module) % len(BAD_FOLDERS)]
    done = run(*(argument.format(bad) for argument in COMMANDS[module]), module=module, cwd=folder)
    assert_one_sentence(done, f"{module}: ", bad.split("/")[0], " cannot be used (")


@pytest.mark.process
@pytest.mark.parametrize("bad", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
@pytest.mark.parametrize(
    ("module", "argument"),
    [("export", "run_dir={}"), ("report", "sweep_dir={}"), ("train", "hydra.sweep.dir={}")],
)
def test_so_is_a_folder_that_a_command_cannot_use(module, argument, bad, folder):
    arguments = ["-m", "k=1,2"] if module == "train" else []
    done = run(*arguments, argument.format(bad), module=module, cwd=folder)
    assert_one_sentence(done, f"{module}: ", bad.split("/")[0])


CONFIG = {
    "k": 8,
    "seed": 0,
    "expansion": 4,
    "n_latents": None,
    "n_tokens": 1000,
    "batch_size": 100,
    "sae": {"_target_": "sae_lab.saes.topk.TopKSAE", "k": 8},
}
METRICS = {
    "fvu": 0.1,
    "nmse": 0.1,
    "l0": 8.0,
    "n_latents": 64,
    "d_in": 16,
    "ce_degradation": 0.1,
    "loss_recovered": 0.9,
}


def write_job(folder: Path, k: int) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(json.dumps(CONFIG | {"k": k, "sae": CONFIG["sae"] | {"k": k}}))
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps([f"k={k}"]))
    (folder / "metrics.json").write_text(json.dumps(METRICS | {"fvu": 1 / k}))
    (folder / "figures").mkdir()
    (folder / "figures" / "l0_per_token.csv").write_text("l0,bos,other\n1,2,3\n2,3,4\n")
    return folder


def swap(file: Path, content: str | bytes) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def in_its_place(file: Path) -> None:
    file.unlink()
    file.mkdir()


def link_to_itself(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def refuse(monkeypatch, file: Path) -> None:
    """Let the system refuse to read one file, as it does to any user but root."""
    opened = Path.open

    def open_unless(path, *args, **kwargs):
        if path == file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_unless)


HYDRA, METRICS_FILE = ".hydra/config.yaml", "metrics.json"
BROKEN = {
    "metrics cut off": (METRICS_FILE, lambda f: swap(f, '{"fvu": 0.1')),
    "metrics emptied": (METRICS_FILE, lambda f: swap(f, "")),
    "metrics in bytes": (METRICS_FILE, lambda f: swap(f, b"\xff\xfe\x00")),
    "metrics a list": (METRICS_FILE, lambda f: swap(f, "[1]")),
    "metrics nested without end": (METRICS_FILE, lambda f: swap(f, "[" * 100_000)),
    "a metric of the wrong type": (METRICS_FILE, lambda f: swap(f, json.dumps(METRICS | {"fvu": "low"}))),
    "a size of the wrong type": (METRICS_FILE, lambda f: swap(f, json.dumps(METRICS | {"n_latents": [64]}))),
    "config cut off": (HYDRA, lambda f: swap(f, '{"k": ')),
    "config emptied": (HYDRA, lambda f: swap(f, "")),
    "config in bytes": (HYDRA, lambda f: swap(f, b"\xff\xfe\x00")),
    "config a list": (HYDRA, lambda f: swap(f, "[1]")),
    "config a folder": (HYDRA, in_its_place),
    "config a link to itself": (HYDRA, link_to_itself),
    "a setting of the wrong type": (HYDRA, lambda f: swap(f, json.dumps(CONFIG | {"seed": "zero"}))),
    "overrides cut off": (".hydra/overrides.yaml", lambda f: swap(f, '["k=')),
    "overrides a mapping": (".hydra/overrides.yaml", lambda f: swap(f, '{"k": 8}')),
    "overrides of no grammar": (".hydra/overrides.yaml", lambda f: swap(f, '["k=[", "=="]')),
}


@pytest.fixture
def sweep(tmp_path) -> Path:
    for k in (2, 4, 16):
        write_job(tmp_path / f"k={k}", k)
    return tmp_path


def assert_row_with_its_reason(sweep: Path, reason: str) -> None:
    """The report has the other jobs as they are, and the broken one with its reason."""
    jobs = {job.job: job for job in job_statuses(sweep, all_jobs(sweep))}
    assert [jobs[name].status for name in ("k=2", "k=4", "k=16")] == ["complete"] * 3
    table = collect_table(sweep).set_index("job")
    assert table["status"].to_dict() == dict.fromkeys(("k=2", "k=4", "k=16"), "complete") | {"k=8": "unreadable"}
    assert table.loc["k=8", "reason"]
    assert reason in table.loc["k=8", "reason"]
    assert table.loc["k=4", ["k", "seed", "fvu"]].tolist() == [4, 0, 0.25]
    assert "fvu 0.0625" in describe_best(all_jobs(sweep), None)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_job_is_a_row_with_its_reason(name, sweep):
    file, damage = BROKEN[name]
    damage(write_job(sweep / "k=8", 8) / file)
    assert_row_with_its_reason(sweep, "number" if "type" in name else "")


@pytest.mark.parametrize("file", [METRICS_FILE, HYDRA, ".hydra/overrides.yaml"])
def test_so_is_one_that_may_not_be_read(file, sweep, monkeypatch):
    refuse(monkeypatch, write_job(sweep / "k=8", 8) / file)
    assert_row_with_its_reason(sweep, "Permission denied")


def test_links_in_a_circle_end(sweep):
    (sweep / "k=2" / "up").symlink_to(sweep)
    (sweep / "again").symlink_to(sweep)
    (sweep / "nowhere").symlink_to("nowhere")
    assert [folder.name for folder in all_jobs(sweep)] == ["k=2", "k=4", "k=16"]


@pytest.mark.process
def test_the_report_of_a_sweep_of_broken_jobs_is_written(sweep):
    """With every kind of damage, a missing SAE, a damaged table, and an emptied failed.txt among good jobs."""
    for i, (file, damage) in enumerate(BROKEN.values()):
        damage(write_job(sweep / f"broken-{i}", 8) / file)
    swap(sweep / "k=2" / "figures" / "l0_per_token.csv", b"l0,bos\nx,\x00")
    swap(sweep / "k=4" / "figures" / "l0_per_token.csv", b"")
    swap(write_job(sweep / "failed", 8) / "failed.txt", b"")
    done = run(f"sweep_dir={sweep}", module="report")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert done.stderr.count("left out of the figures") == 1
    table = pd.read_csv(sweep / "report.csv")
    assert table["status"].value_counts().to_dict() == {"unreadable": len(BROKEN), "complete": 3, "failed": 1}
    assert table.loc[table["status"] == "unreadable", "reason"].notna().all()
    text = (sweep / "report.md").read_text()
    assert text.count(": unreadable ") == len(BROKEN)
    assert str(sweep) not in text + (sweep / "report.csv").read_text()
    assert (sweep / "figures" / "l0_per_token.png").is_file()


@pytest.mark.process
def test_the_report_of_broken_jobs_alone_says_so(sweep):
    for k in (2, 4, 16):
        swap(sweep / f"k={k}" / METRICS_FILE, "[")
    done = run(f"sweep_dir={sweep}", module="report")
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 jobs: 3 unreadable." in done.stdout


@pytest.mark.process
@pytest.mark.parametrize("module", ["evaluate", "features"])
def test_a_damaged_config_is_one_sentence(module, sweep):
    for text in (b"\xff", b"{", b""):
        swap(sweep / "k=2" / HYDRA, text)
        assert_one_sentence(run(f"run_dir='{sweep / 'k=2'}'", module=module), "config.yaml cannot be read (")


def test_figures_are_not_written_through_a_link(tmp_path):
    sweep, elsewhere = tmp_path / "sweep", tmp_path / "elsewhere"
    sweep.mkdir()
    elsewhere.mkdir()
    (sweep / "figures").symlink_to(elsewhere)
    with pytest.raises(UserError, match="figures is a link"):
        draw_sweep(pd.DataFrame({"job": ["a", "b"]}), sweep)


def test_planned_jobs_stay_in_their_folder(tmp_path):
    (tmp_path / "jobs.txt").write_text("/etc\n../outside\nk=8\n\n")
    assert planned_jobs(tmp_path) == [tmp_path / "k=8"]
