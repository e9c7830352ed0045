"""A run folder that somebody sent runs nothing: whatever its config asks for is refused before anything is built."""

import shutil
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from sae_lab.cli.help import CONF
from sae_lab.runs.config import MOVED, read_config
from sae_lab.runs.loading import check_parts, load_run
from sae_lab.runs.trust import TRUSTED, check_trusted, targets
from sae_lab.runtime.errors import UserError

RUN = Path(__file__).parents[1] / "runs" / "fixtures" / "eac9ea5"
SHELL = {"_target_": "os.system", "command": "touch ran"}
TOUCH = {"_target_": "pathlib.Path.touch", "_args_": ["ran"]}

# Each is set in the config of a run: a path of keys, and what stands there.
CODE = {
    "an unused node": ("data.zzz", SHELL),
    "collect_env, as it was seen": ("data.zzz", {"_target_": "torch.utils.collect_env.run", "command": "touch ran"}),
    "a partial": ("data.zzz", SHELL | {"_partial_": True}),
    "positional arguments": ("lm.zzz", TOUCH),
    "a list": ("data.zzz", [1, [TOUCH]]),
    "deep below": ("lm.a", {"b": {"c": [{"d": SHELL}]}}),
    "the language model itself": ("lm._target_", "os.system"),
    "the data themselves": ("data._target_", "subprocess.check_call"),
    "the SAE, which is imported": ("sae._target_", "ran_on_import.SAE"),
    "the inner SAE": ("sae.inner", {"_target_": "builtins.exec", "_args_": ["open('ran', 'w')"]}),
    "the optimizer": ("optimizer._target_", "os.system"),
    "something in torch.optim that is no optimizer": ("optimizer._target_", "torch.optim.lr_scheduler.os.system"),
    "a module of ours that imports others": ("data.zzz", {"_target_": "sae_lab.runs.provenance.subprocess.run"}),
    "a function of ours that writes": ("data.zzz", {"_target_": "sae_lab.runtime.files.write_atomically"}),
    "a command of ours": ("data.zzz", {"_target_": "sae_lab.train.main"}),
    "a name of ours with more behind it": ("data.zzz", {"_target_": "sae_lab.lm.paired.PairedLM.__init__"}),
    "an SAE's method": ("data.zzz", {"_target_": "sae_lab.saes.topk.TopKSAE.load_state_dict"}),
    "an SAE of another's module": ("sae._target_", "elsewhere.TopKSAE"),
    "a number": ("data.zzz", {"_target_": 7}),
    "Hydra's own": ("data.zzz", {"_target_": "hydra.utils.instantiate", "config": SHELL}),
    "a callback": ("callbacks", {"mine": SHELL}),
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A run, in a folder from which a module `ran_on_import` can be imported that leaves a trace."""
    shutil.copytree(RUN / "finished", tmp_path / "sent")
    shutil.copy(RUN / "text.md", tmp_path)
    (tmp_path / "ran_on_import.py").write_text("open('ran', 'w')\nclass SAE: ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "sent"


def change(folder: Path, key: str, value) -> None:
    file = folder / ".hydra" / "config.yaml"
    config = node = yaml.safe_load(file.read_text())
    *path, last = key.split(".")
    for name in path:
        node = node.setdefault(name, {})
    node[last] = value
    file.write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("name", CODE)
def test_code_in_a_config_is_refused_by_its_name_and_does_not_run(folder, name):
    key, value = CODE[name]
    change(folder, key, value)
    [(_, target), *_] = list(targets(value)) or [("", value)]
    with pytest.raises(UserError, match=r"asks to run .* is not part of this package") as refused:
        load_run(folder, device="cpu")
    assert f"asks to run {target} (" in str(refused.value)
    assert "add trust=" in str(refused.value)
    assert not Path("ran").exists()


OF_MODELS = {
    "lm.trust_remote_code": (True, "run code that comes with a model"),
    "lm.tuned.trust_remote_code": ("yes", "run code that comes with a model"),
    "data.trust_remote_code": (1, "run code that comes with a model"),
    "lm.load": ({"attn_implementation": "somebody/kernels"}, "attn_implementation=somebody/kernels"),
    "lm.base.load": ({"use_kernels": True}, "use_kernels=True"),
}


@pytest.mark.parametrize("key", OF_MODELS)
def test_code_of_a_language_model_runs_only_if_the_key_is_named(folder, key):
    value, what = OF_MODELS[key]
    change(folder, key, value)
    with pytest.raises(UserError, match=rf"asks to .*{what} \({key}\): .* add trust={key}\.$"):
        load_run(folder, device="cpu")
    check_trusted(OmegaConf.to_container(read_config(folder)), folder, trust=key)


def test_harmless_ways_to_load_a_model_need_no_trust(folder):
    quantisation = {"load_in_8bit": True}
    change(folder, "lm.load", {"attn_implementation": "eager", "quantization_config": quantisation})
    change(folder, "lm.trust_remote_code", False)
    check_trusted(OmegaConf.to_container(read_config(folder)), folder)


YAML = {
    "a Python tag": "a: !!python/object/apply:os.system ['touch ran']\n",
    "an alias": "a: &x [1]\nb: *x\n",
    "a bomb of aliases": "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
    "a resolver": "lm: {name: '${oc.env:HOME}'}\n",
    "a resolver in a resolver": "k: 1\nlm: {name: '${oc.decode:${oc.env:HOME}}'}\n",
    "a resolver by an interpolated name": "k: oc.env\nlm: {name: '${${k}:HOME}'}\n",
    "a resolver in a key's list": "data: {paths: [['${oc.env:HOME}']]}\n",
    "brackets without end": "[" * 100_000,
    "no mapping": "- 1\n",
    "half a file": "lm: {name: 'tin",
    "bytes": b"\xff\xfe\x00lm",
    "nothing": "",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_no_run_writes_is_one_sentence(folder, name):
    text = YAML[name]
    (folder / ".hydra" / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"config\.yaml (cannot be read|is not a run)"):
        load_run(folder, device="cpu")
    assert not Path("ran").exists()


def test_what_the_user_trusts_may_run(folder):
    change(folder, "optimizer._target_", "my_package.optim.Mine")
    for trust in ("my_package", "my_package.optim", ["other", "my_package.optim.Mine"]):
        load_run(folder, device="cpu", trust=trust)
    for trust in ("my_package.opt", "my", "", ["other"]):
        with pytest.raises(UserError, match=r"add trust=my_package\.optim\."):
            load_run(folder, device="cpu", trust=trust)


@pytest.mark.parametrize("file", sorted(CONF.glob("*/*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_target_of_conf_is_trusted(file):
    if file.parent.name == "hydra":
        return
    content = yaml.safe_load(file.read_text())
    check_trusted(content if "# @package _global_" in file.read_text() else {file.parent.name: content}, file)


def test_so_are_the_names_that_moved():
    for new in MOVED.values():
        places = (place for place, names in TRUSTED.items() if new in names)
        check_trusted({next(places, "sae"): {"_target_": new}}, Path("x"))
    assert read_config(RUN / "finished").optimizer._target_ == "torch.optim.Adam"


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("data.zzz", "sae_lab.training.loggers.WandbLog"),
        ("data.zzz", "sae_lab.training.callbacks.KeepSAEs"),
        ("sae.inner", "sae_lab.training.schedule.warmup_decay"),
        ("lm", "torch.optim.Adam"),
        ("data", "sae_lab.training.trainer.build_trainer"),
    ],
)
def test_a_trusted_name_is_trusted_in_its_place_only(key, target):
    """W&B's logger below `data` would start a run, and send it, before anything refuses it."""
    config: dict = {"_target_": target}
    for name in reversed(key.split(".")):
        config = {name: config}
    with pytest.raises(UserError, match=f"asks to run {target} .* in that place"):
        check_trusted(config, Path("config.yaml"))


def test_a_target_that_is_no_name_is_refused():
    with pytest.raises(UserError, match="is not part of this package"):
        check_trusted({"sae": {"_target_": ["os.system"]}}, Path("config.yaml"))


@pytest.mark.parametrize(
    "node", [None, "x", [1], {}, {"_target_": "a.b", "_args_": [1]}, {"_target_": "a.b", "_partial_": True}]
)
@pytest.mark.parametrize("part", ["lm", "data", "sae"])
def test_a_part_that_says_nothing_to_build_is_damage(part, node):
    config = {name: {"_target_": "a.b"} for name in ("lm", "data", "sae")} | {part: node}
    with pytest.raises(UserError, match=rf"config\.yaml is damaged \({part} does not say what to build\)"):
        check_parts(OmegaConf.create(config), Path("config.yaml"))
