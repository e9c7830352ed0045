"""Where a language model may come from, and what a user is told when it does not come."""

import inspect
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import hydra
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from sae_lab.cli.help import CONF
from sae_lab.lm import TransformerLensLM, TransformersLM
from sae_lab.lm.finding import TINY, find_folder
from sae_lab.lm.loading import load_model
from sae_lab.lm.sites import find_blocks
from sae_lab.runtime.errors import UserError

SITE = "transformer.h.2"
SMALL = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
FAMILIES = {"llama": "model.layers", "gpt_neox": "gpt_neox.layers", "qwen3": "model.layers", "gemma2": "model.layers"}


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that refuses connections, wherever the tests run."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


def copy_of_tiny(folder: Path, without: str = "no file") -> Path:
    return Path(shutil.copytree(find_folder(TINY), folder, ignore=shutil.ignore_patterns(f"{without}*")))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_other_architectures_from_a_folder(family, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL, num_key_value_heads=2, head_dim=16, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    for path in find_folder(TINY).glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    stack = FAMILIES[family]
    lm = TransformersLM(str(tmp_path), [f"{stack}.1", f"{stack}.0"], device="cpu")
    assert lm.d == 32
    assert find_blocks(lm.model) == [f"{stack}.{i}" for i in range(3)]
    tokens = torch.randint(0, 4096, (2, 9))
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
    x = lm.activations(tokens)
    torch.testing.assert_close(x, torch.stack([out.hidden_states[2], out.hidden_states[1]], dim=2))
    torch.testing.assert_close(lm.logits(tokens, x), out.logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("back_end", "site"), [(TransformersLM, SITE), (TransformerLensLM, "blocks.3.hook_resid_pre")])
@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_model_of_the_cache_needs_no_hub(back_end, site, revision, no_hub, monkeypatch, tmp_path):
    """As `hf download` leaves it: no record of the optional files that the repository does not have."""
    commit = "a" * 40
    copy_of_tiny(tmp_path / "models--acme--tiny" / "snapshots" / commit)
    refs = tmp_path / "models--acme--tiny" / "refs"
    refs.mkdir()
    (refs / (revision or "main")).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.perf_counter()
    assert back_end("acme/tiny", site, device="cpu", revision=revision).d == 128
    assert time.perf_counter() - start < 20


def test_hub_out_of_reach(no_hub):
    start = time.perf_counter()
    with pytest.raises(UserError, match="cannot be reached") as e:
        load_model("acme/not-in-any-cache", "float32", None)
    assert time.perf_counter() - start < 10  # huggingface_hub by itself retries for 23 seconds, and more than once
    fix = "use lm=tiny, give a local folder, or download it first with `hf download acme/not-in-any-cache`"
    assert fix in str(e.value)
    assert "\n" not in str(e.value)


def test_no_such_model_on_the_hub(monkeypatch):
    def not_found(*_args, **_kwargs):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", not_found)
    with pytest.raises(UserError, match="neither a local folder nor a model on the hub"):
        load_model("acme/not-in-any-cache", "float32", None)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c"])
def test_no_such_folder(name):
    with pytest.raises(UserError, match="is not a folder"):
        load_model(name, "float32", None)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "without config.json"), ("model", "model.safetensors"), ("tokenizer", "its tokenizer is missing")],
)
def test_incomplete_folder(missing, message, tmp_path):
    folder = copy_of_tiny(tmp_path / "lm", without=missing)
    with pytest.raises(UserError, match=message) as e:
        load_model(str(folder), "float32", None)
    assert "\n" not in str(e.value)


def test_a_model_of_another_kind(tmp_path):
    folder = copy_of_tiny(tmp_path / "lm")
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        load_model(str(folder), "float32", None)


@pytest.mark.parametrize("dtype", ["fp32", "int64", "nn"])
def test_unknown_dtype(dtype):
    with pytest.raises(UserError, match=f"^dtype={dtype}"):
        load_model(TINY, dtype, None)


def test_unknown_device():
    with pytest.raises(UserError, match=r"^device=gpu"):
        TransformersLM(TINY, SITE, device="gpu")


@pytest.mark.parametrize("cls", [TransformersLM, TransformerLensLM])
def test_a_model_spread_by_a_device_map_is_the_same_model(cls):
    tokens, site = torch.arange(20).view(2, 10), "blocks.3.hook_resid_pre"
    here, spread = cls(TINY, site, device="cpu"), cls(TINY, site, device_map={"": "cpu"})
    assert torch.equal(spread.activations(tokens), here.activations(tokens))
    assert torch.equal(spread.logits(tokens), here.logits(tokens))


def test_device_and_device_map_exclude_each_other():
    with pytest.raises(UserError, match=r"^device=cuda:1 and device_map=auto exclude each other"):
        TransformersLM(TINY, SITE, device="cuda:1", device_map="auto")


def test_loading_is_quiet_and_restores_the_settings(capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    TransformersLM(TINY, SITE, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.process
def test_only_its_back_end_imports_transformer_lens():
    code = "import sys, sae_lab.lm; sys.exit('transformer_lens' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def compose(choice: str):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(f"lm/{choice}").lm


def defaults(cls: type) -> dict:
    """The arguments of a back end, those that it passes on included, and what they are unless given."""
    found: dict = {}
    for c in cls.__mro__:
        parameters = inspect.signature(c).parameters.values()
        found = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD} | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


@pytest.mark.parametrize("choice", sorted(p.stem for p in (CONF / "lm").glob("*.yaml")))
def test_every_choice_has_the_keys_of_its_constructor(choice):
    config = OmegaConf.to_container(compose(choice))
    assert set(config) == {"_target_", *defaults(get_class(config["_target_"]))}


@pytest.mark.parametrize("choice", ["transformers", "transformer_lens", "nnsight"])
def test_yaml_and_signature_have_the_same_defaults(choice):
    config = OmegaConf.to_container(compose(choice))
    missing = {"name": inspect.Parameter.empty, "sites": inspect.Parameter.empty}
    assert {k: v for k, v in config.items() if k != "_target_"} | missing == defaults(get_class(config["_target_"]))


def test_the_default_choice_runs():
    lm = instantiate(compose("tiny"))
    assert (lm.sites, lm.d) == ((SITE,), 128)


def test_a_folder_of_ones_own(tmp_path):
    config = compose("transformers")
    assert OmegaConf.missing_keys(config) == {"lm.name"}
    config.name, config.sites = str(copy_of_tiny(tmp_path / "lm")), [SITE]
    assert instantiate(config, device="cpu").d == 128
