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
    ([*ROUTE, "sae.inner=10"], "sae.inner=10 must be a part of the config with a sae.inner._target_: leave out this"),
    ([*ROUTE, "k=0"], "k=0 must lie between 1 and the dictionary's 1024 latents."),
    (
        [*ROUTE, "+sae.inner.bogus=1"],
        "sae.inner.bogus is not a setting of DictionarySAE (sae.inner._target_): remove it, or correct its name.",
    ),
    (["sae.hidden=[0]"], "sae.hidden=[0] must be a list of positive widths: [512], or [] for no MLP."),
    (["optimizer.lr=-1"], "optimizer.lr=-1 must be a number above 0, or auto."),
    (
        ["+trainer.bogus=1"],
        "trainer.bogus is not a setting of build_trainer (trainer._target_): remove it, or correct its name.",
    ),
    (
        ["optimizer._target_=torch.optim.Muon", "optimizer.lr=1e-3"],
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
    (
        ["sae.normalize=rms"],
        "sae.normalize=rms is not known: choose none, per_token, constant_norm, mean_norm, centred or whiten.",
    ),
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
    (["lm.load=[16,16]"], "lm.load=[16, 16] must be a mapping, such as 'lm.load={attn_implementation: eager}'."),
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
    (["trainer.log_every=0"], "trainer.log_every=0 is not known: choose auto or a whole number of at least 1."),
    (["lm.dtype=null"], "lm.dtype=null must be a string."),
    (["lm.bos_id=abc"], "lm.bos_id=abc must be null or a whole number."),
    (["data.held_out_every=0"], f"data.held_out_every=0 {WHOLE} 2."),
    (["data.exclude_bos=''"], "data.exclude_bos='' must be true or false."),
    (["data.n_val_tokens=null"], f"data.n_val_tokens=null {WHOLE} 1."),
    (
        ["seed=18446744073709551616"],
        "seed=18446744073709551616 is too large: a whole number is at most 9223372036854775",
    ),
    (["trainer.accelerator=true"], "trainer.accelerator=true is not known: choose auto, cpu, cuda, gpu or mps."),
    (["sae._target_=3"], "sae._target_=3 must be a string."),
    (["sae._target_=os"], "sae._target_ must be the full name of a class or a function."),
    (["init_from=3"], "init_from=3 must be null or a string."),
    (
        ["lm=paired", "lm.base.name=tiny", "lm.base.sites=[transformer.h.1]", "lm.tuned=tiny"],
        "lm.tuned=tiny must be a part of the config with a lm.tuned._target_: leave out this override, and set",
    ),
    (["n_latents=1_000_000_000_000"], "the decoder of that many latents takes 4.77e+05 GiB, and the memory has"),
    (["n_tokens=1e15", "data.block_tokens=1e15"], "a block takes 4.77e+08 GiB, and the memory has"),
    (["data.lm_batch_rows=1e9"], "the activations of data.lm_batch_rows rows take 6.1e+04 GiB, and the memory has"),
    (["sae.hidden=[1000000000000]"], "not enough memory (4.77e+05 GiB for one tensor): lower what multiplies it"),
    (["schedule.warmup=0.6", "schedule.decay=0.5"], "schedule.warmup=0.6 and schedule.decay=0.5 are shares"),
]
OF_OTHER_COMMANDS = [
    ("planted", ["planted.noise=-1"], "planted.noise=-1 must be a number of at least 0."),
    ("planted", ["planted.active=0"], "planted.active=0 must be a number above 0."),
    ("planted", ["planted=3"], "planted=3 names no choice of planted: type planted=NAME, one of hierarchy, synth_"),
    (
        "planted",
        ["planted=hierarchy", "planted.exclusive=2"],
        "planted.exclusive=2 must be a number of at least 0 and at most 1.",
    ),
    ("planted", ["k=0"], "k=0 must lie between 1 and the dictionary's 512 latents."),
    ("planted", ["n_steps=0"], f"n_steps=0 {WHOLE} 1."),
    ("harvest", ["cache_dir=cache", "shard_tokens=0"], f"shard_tokens=0 {WHOLE} 1."),
    (
        "harvest",
        ["cache_dir=cache", "dtype=int4"],
        "dtype=int4 is not known: choose float32, float16, bfloat16, int8, float8_e4m3 or auto.",
    ),
    ("features", ["run_dir=.", "n_top=-1"], f"n_top=-1 {WHOLE} 0."),
    ("benchmark", ["repeats=0"], f"repeats=0 {WHOLE} 1."),
    ("benchmark", ["dead_share=2"], "dead_share=2 must be a number of at least 0 and at most 1."),
    ("benchmark", ["dense=maybe"], "dense=maybe must be true or false."),
    ("throughput", ["slices=1.5"], f"slices=1.5 {WHOLE} 1."),
    ("throughput", ["expansion=null"], "n_latents=null with expansion=null does not define the size of the dictionary"),
    ("harvest", ["cache_dir=3"], "cache_dir=3 must be a string."),
    (
        "evaluate",
        ["run_dir=.", "pursuit=3"],
        "pursuit=3 is in the place of a part of the config: set its keys, pursuit",
    ),
    ("export", ["run_dir=.", "out=3"], "out=3 must be null or a string."),
    ("export", ["run_dir=.", "private=maybe"], "private=maybe must be true or false."),
    ("evaluate", ["run_dir=.", "n_eval_tokens=0"], "n_eval_tokens=0 must be null or a whole number of at least 1."),
]
NO_OVERRIDES = [
    ("k", "k is not a setting: type k=VALUE."),
    ("=3", "=3 has no key: type KEY=3."),
    ("-k", "-k is not an option: type KEY=VALUE for a setting, or see --help."),
    ("k=[", "k=[ cannot be read: close its brackets and quotes or, for a string, type 'k=\"[\"'."),
    ("sae=topk,", "sae=topk, ends in a comma: leave it out, or add -m and another value to sweep over both."),
    ("k=8,16", "k=8,16 has several values: add -m to sweep over them, or type 'k=[8,16]' for a list."),
    ("k=range(3)", "k=range(3) is a sweep: add -m to the command."),
    (
        "k=${nokey}",
        "k=${nokey} cannot be resolved (Interpolation key 'nokey' not found): correct what stands in ${...},",
    ),
    (
        "sae=matrioshka",
        "sae=matrioshka is not known: did you mean matryoshka? It must be one of abs_batch_topk, abs_topk, ",
    ),
    ("sae=[0]", "sae=[0] names no choice of sae: type sae=NAME, one of abs_batch_topk, abs_topk, batch_topk, "),
    ("~sae", "sae must be a part of the config with a sae._target_, not null: leave out the override of sae, and set "),
    ("+k=3", "k is in the config already: leave out the + before it."),
    ("+sae=topk", "sae is given two choices: leave out the + before it."),
    ("~k=1", "~k=1 removes nothing: type ~k."),
    ("~nokey", "~nokey removes nothing: the config has no key nokey."),
    ("hydra.verbose=3", "hydra.verbose=3 does not fit there: `--cfg hydra` prints what Hydra takes."),
    ("hydra/launcher=nope", "hydra/launcher=nope is not known: it must be one of basic, gpus, shared_stream, slurm."),
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


@pytest.mark.parametrize(("typed", "sentence"), NO_OVERRIDES)
def test_what_hydra_cannot_read_or_compose_is_told_with_what_to_type(typed, sentence, tmp_path):
    assert_told(run(typed, f"hydra.run.dir={tmp_path}"), f"train: {sentence}")


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
