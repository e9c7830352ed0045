"""A setting that cannot be: one sentence that names the key as it was typed."""

import subprocess

import pytest
from shell import run

pytestmark = pytest.mark.process

ROUTE = ["sae=route", "lm.sites=[transformer.h.1,transformer.h.3]"]
WHOLE = "must be a whole number of at least"
MISTAKES = [
    ([*ROUTE, "sae.inner.k_warmup=-1"], f"sae.inner.k_warmup=-1 {WHOLE} 0."),
    ([*ROUTE, "sae.inner.seed=-1"], f"sae.inner.seed=-1 {WHOLE} 0."),
    ([*ROUTE, "k=0"], "k=0 must lie between 1 and the dictionary's 1024 latents."),
    (
        [*ROUTE, "+sae.inner.bogus=1"],
        "sae.inner.bogus is not a setting of DictionarySAE (sae.inner._target_): remove it, or correct its name.",
    ),
    (["sae.hidden=[0]"], "sae.hidden=[0] must be a list of positive widths: [512], or [] for no MLP."),
    (["optimizer.lr=-1"], "optimizer.lr=-1 must be a number above 0."),
    (
        ["+trainer.bogus=1"],
        "trainer.bogus is not a setting of build_trainer (trainer._target_): remove it, or correct its name.",
    ),
    (
        ["optimizer._target_=torch.optim.Muon"],
        "optimizer.betas is not a setting of Muon (optimizer._target_): remove it, or correct its name.",
    ),
    (
        ["optimizer._target_=torch.optim.NAdam", "~optimizer.fused", "+optimizer.momentum_decay=-1"],
        "optimizer cannot be built: Invalid momentum_decay value: -1",
    ),
    (["k=0"], "k=0 must lie between 1 and the dictionary's 1024 latents."),
    (["sae.k=0"], "sae.k=0 must lie between 1 and the dictionary's 1024 latents."),
    (
        ["sae=topk", "k=2.5"],
        "k=2.5 must be a whole number here: only rules over the batch take a fraction.",
    ),
    (["~sae.k"], "sae.k has no value: give sae.k=..."),
    (["seed=-1"], f"seed=-1 {WHOLE} 0."),
    (["sae.seed=-1"], f"sae.seed=-1 {WHOLE} 0."),
    (
        ["sae.k_start=0"],
        "sae.k_start=0 must lie between 1 and the dictionary's 1024 latents.",
    ),
    (["sae.decoder_norm=both"], "sae.decoder_norm=both is not known: choose joint or sum."),
    (["sae.normalize=rms"], "sae.normalize=rms is not known: choose none, per_token, constant_norm or mean_norm."),
    (
        ["sae=matryoshka", "sae.group_sizes=[3]"],
        "sae.group_sizes=[3] must sum to the dictionary's 1024 latents: each is what its group adds.",
    ),
    (["sae=matryoshka", "sae.active_groups=99"], "sae.active_groups=99 must lie between 1 and the 4 groups."),
    (["batch_size=0"], f"batch_size=0 {WHOLE} 1."),
    (["data.batch_size=0"], f"data.batch_size=0 {WHOLE} 1."),
    (["data.exclude_first=1.5"], f"data.exclude_first=1.5 {WHOLE} 0."),
    (["data.held_out_every=1"], f"data.held_out_every=1 {WHOLE} 2."),
    (["data.exclude_first=128"], "data.exclude_first=128 leaves nothing of a row of seq_len=128 tokens."),
    (["data.repeat=maybe"], "data.repeat=maybe must be true or false."),
    (["lm.sites=null"], "lm.sites=null must name at least one site, and none twice: choose among transformer.h.0 ... "),
    (["lm.sites=true"], "lm.sites=true must be null, a list of strings or a string."),
    (
        [
            "lm=paired",
            "lm.base.name=tiny",
            "lm.base.sites=[transformer.h.1]",
            "lm.tuned.name=tiny",
            "lm.tuned.dtype=fp3",
        ],
        "lm.tuned.dtype=fp3 is not a floating-point dtype",
    ),
    (["callbacks=keep_saes", "callbacks.keep_saes.every=0"], f"callbacks.keep_saes.every=0 {WHOLE} 1."),
    (["trainer.log_every=0"], f"trainer.log_every=0 {WHOLE} 1."),
    (["schedule.warmup=0.6", "schedule.decay=0.5"], "schedule.warmup=0.6 and schedule.decay=0.5 are shares"),
]
OF_OTHER_COMMANDS = [
    ("planted", ["planted.noise=-1"], "planted.noise=-1 must be a number of at least 0."),
    ("planted", ["planted.active=0"], "planted.active=0 must be a number above 0."),
    ("planted", ["k=0"], "k=0 must lie between 1 and the dictionary's 512 latents."),
    ("planted", ["n_steps=0"], f"n_steps=0 {WHOLE} 1."),
    ("harvest", ["cache_dir=cache", "shard_tokens=0"], f"shard_tokens=0 {WHOLE} 1."),
    (
        "harvest",
        ["cache_dir=cache", "dtype=int8"],
        "dtype=int8 is not known: choose float32, float16, bfloat16 or auto.",
    ),
    ("features", ["run_dir=.", "n_top=-1"], f"n_top=-1 {WHOLE} 0."),
    ("benchmark", ["repeats=0"], f"repeats=0 {WHOLE} 1."),
    ("benchmark", ["dead_share=2"], "dead_share=2 must be a number of at least 0 and at most 1."),
    ("benchmark", ["dense=maybe"], "dense=maybe must be true or false."),
    ("throughput", ["slices=1.5"], f"slices=1.5 {WHOLE} 1."),
    ("export", ["run_dir=.", "private=maybe"], "private=maybe must be true or false."),
    ("evaluate", ["run_dir=.", "n_eval_tokens=0"], "n_eval_tokens=0 must be null or a whole number of at least 1."),
]


def name(value: object) -> str | None:
    """The last override, for a test's name."""
    return value[-1] if isinstance(value, list) else None


@pytest.mark.parametrize(("overrides", "sentence"), MISTAKES, ids=name)
def test_a_wrong_setting_is_named_as_it_was_typed(overrides, sentence, tmp_path):
    assert_told(run(*overrides, f"hydra.run.dir={tmp_path}"), f"train: {sentence}")


@pytest.mark.parametrize(("module", "overrides", "sentence"), OF_OTHER_COMMANDS, ids=name)
def test_so_is_that_of_another_command(module, overrides, sentence, tmp_path):
    assert_told(run(*overrides, f"hydra.run.dir={tmp_path}", module=module), f"{module}: {sentence}")


@pytest.mark.parametrize("launcher", ["basic", "shared_stream"])
def test_so_is_that_of_a_job_of_a_sweep(launcher, tmp_path):
    """The jobs of shared_stream are resolved before they are built."""
    jobs = ["sae=topk,route", "k=0", "lm.sites=[transformer.h.1,transformer.h.3]", "sae.seed=0"]
    done = run("-m", *jobs, f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    failures = [file.read_text() for file in tmp_path.glob("*/failed.txt")]
    assert len(failures) == 2
    assert {text.partition(" must")[0] for text in failures} == {"k=0"}


def assert_told(done: subprocess.CompletedProcess[str], sentence: str) -> None:
    """That a command ended with one sentence, which begins like this one."""
    assert done.returncode == 1
    assert done.stderr.startswith(sentence)
    assert done.stderr.count("\n") == 1
