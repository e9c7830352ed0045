"""The names of a sweep's jobs leave out what is the same in all of them."""

from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from sae_lab.cli.folder_names import EXCLUDED, folder_name, leave_out_constants

SWEEP = ["-m", "sae=topk,batch_topk", "n_tokens=1000", "+data.x=[a,b]", "hydra/launcher=shared_stream"]
OUT = f"{EXCLUDED}=['n_tokens','data.x']"


def job_in(folder: Path, name: str, *overrides: str) -> None:
    (folder / name / ".hydra").mkdir(parents=True)
    (folder / name / ".hydra" / "overrides.yaml").write_text("".join(f"- {line}\n" for line in overrides))


def test_settings_with_one_value_are_left_out_of_the_names_in_a_new_folder(tmp_path):
    assert leave_out_constants(SWEEP) == [*SWEEP, OUT]
    new = [*SWEEP, f"hydra.sweep.dir={tmp_path / 'new'}"]
    assert leave_out_constants(new) == [*new, OUT]


def test_nothing_is_left_out_where_nothing_is_swept_or_no_sweep_runs():
    for arguments in (["-m", "k=8"], ["k=8", "n_tokens=10"], ["-m", "k=8,16"], ["-m", "k=8,16", "a=[b"], [*SWEEP, OUT]):
        assert leave_out_constants(arguments) == arguments


FREE = [
    "+callbacks.mine._target_=a.B",
    "data.prefetch=true",
    "logger=wandb",
    "logger.wandb.offline=true",
    "resume=auto",
]
"""Settings that may change when a job is resumed."""


def test_a_job_keeps_its_folder_where_what_may_differ_does(tmp_path):
    """A sweep that is continued with other intervals, on another device or into W&B, in a folder of long names too."""
    names = "'callbacks.mine._target_','data.prefetch','logger','logger.wandb.offline','resume'"
    long = ["-m", "k=8,16", "lr=1", f"hydra.sweep.dir={tmp_path}", *FREE]
    job_in(tmp_path, "k=8,lr=1", "k=8", "lr=1")
    assert leave_out_constants(long) == [*long, f"{EXCLUDED}=[{names}]"]
    assert leave_out_constants(["-m", *FREE]) == ["-m", *FREE]  # a sweep over nothing else
    job_in(tmp_path, "k=8", "k=8", "lr=1", "trainer.devices=2")
    more = ["-m", "k=8,16", "lr=1", "trainer.devices=4", f"hydra.sweep.dir={tmp_path}"]
    assert leave_out_constants(more) == [*more, f"{EXCLUDED}=['lr','trainer.devices']"]


def test_jobs_that_differ_in_what_changes_no_number_have_different_names():
    arguments = ["-m", "trainer.micro_batches=1,5", "k=4,8", "trainer.shard_latents=2"]
    assert leave_out_constants(arguments) == [*arguments, f"{EXCLUDED}=['trainer.shard_latents']"]
    assert folder_name("k=4,trainer.micro_batches=5,x=a/b") == "k=4,trainer.micro_batches=5,x=a_b"


def test_a_sweep_of_before_keeps_the_names_of_its_jobs(tmp_path):
    again = [*SWEEP, f"hydra.sweep.dir={tmp_path}"]
    job_in(tmp_path, "+data.x=[a,b],n_tokens=1000,sae=topk", "sae=topk", "n_tokens=1000", "+data.x=[a,b]")
    assert leave_out_constants(again) == again


def test_a_folder_goes_on_with_short_names_unless_the_constants_differ(tmp_path):
    again = [*SWEEP, f"hydra.sweep.dir={tmp_path}"]
    job_in(tmp_path, "sae=topk", "sae=topk", "n_tokens=1000", "+data.x=[a,b]")
    assert leave_out_constants(again) == [*again, OUT]
    other = [argument.replace("1000", "2000") for argument in again]
    assert leave_out_constants(other) == other


def test_a_sweep_beside_jobs_of_other_constants_says_what_continues_them(tmp_path, caplog):
    again = [*SWEEP, f"hydra.sweep.dir={tmp_path}"]
    other = [argument.replace("1000", "2000") for argument in again]
    job_in(tmp_path, "sae=topk", "sae=topk", "n_tokens=1000", "+data.x=[a,b]")
    leave_out_constants(again)
    assert caplog.messages == []
    leave_out_constants(other)
    assert caplog.messages == [
        f"{tmp_path} holds jobs with n_tokens=1000, so the jobs of this sweep, with n_tokens=2000, get folders of "
        "their own there: type n_tokens=1000 to continue those, or type another hydra.sweep.dir to start anew."
    ]
    caplog.clear()
    leave_out_constants([*again, "seed=3"])
    assert "holds jobs without seed, so" in caplog.text
    assert ": leave it out to continue those, or" in caplog.text
    caplog.clear()
    job_in(tmp_path, "+data.x=[a,b],n_tokens=2000,sae=topk", "sae=topk", "n_tokens=2000", "+data.x=[a,b]")
    assert leave_out_constants(other) == other
    assert caplog.messages == []  # the second time it continues its own jobs


def test_a_folder_goes_on_however_a_constant_is_spelled(tmp_path):
    constants = ["n_tokens=20_000", "optimizer.lr=1e-3", "data.prefetch=false", "lm.sites=[a, b]", "+note='x: y'"]
    [[listed]] = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(constants), None)
    assert listed[:3] == ["n_tokens=20000", "optimizer.lr=0.001", "data.prefetch=False"]
    job_in(tmp_path, "k=4", "k=4")
    OmegaConf.save(OmegaConf.create(["k=4", *listed]), tmp_path / "k=4" / ".hydra" / "overrides.yaml")
    again = ["-m", "k=4,8", *constants, f"hydra.sweep.dir={tmp_path}"]
    keys = "'n_tokens','optimizer.lr','data.prefetch','lm.sites','note'"
    assert leave_out_constants(again) == [*again, f"{EXCLUDED}=[{keys}]"]
