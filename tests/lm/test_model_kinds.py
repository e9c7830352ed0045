"""Every kind of language model in the table of docs/language-models.md is understood, or refused in one sentence."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import MULTIMODAL, add_tokenizer, make_model, save_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from sae_lab.activations.digests import weights_digest
from sae_lab.lm import NnsightLM, PairedLM, TransformersLM
from sae_lab.lm.finding import TINY, find_folder
from sae_lab.lm.sites import find_blocks
from sae_lab.runtime.errors import UserError

TOKENS = torch.randint(1, 4096, (2, 9), generator=torch.Generator().manual_seed(0))
DECODERS = {"llama": "model.layers", "mixtral": "model.layers", "mamba": "backbone.layers", "rwkv": "rwkv.blocks"}
RECURRENT = ("mamba", "rwkv")
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="pip install 'sae-lab[peft]'")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns the folder of a model of a kind, made once."""
    base, made = tmp_path_factory.mktemp("models"), {}

    def folder(kind: str) -> str:
        made.setdefault(kind, None)
        made[kind] = made[kind] or save_model(base / kind, kind)
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", list(DECODERS))
def test_blocks_of_a_decoder_are_its_hidden_states(kind, folders):
    stack = DECODERS[kind]
    lm = TransformersLM(folders(kind), [f"{stack}.0", f"{stack}.1.input"], device="cpu")
    with torch.no_grad():
        expected = lm.model(TOKENS, output_hidden_states=True, use_cache=False)
    x = lm.activations(TOKENS)
    after_block_0 = expected.hidden_states[0 if kind in RECURRENT else 1]  # these do not return the embeddings
    torch.testing.assert_close(x, torch.stack([after_block_0] * 2, dim=2))
    torch.testing.assert_close(lm.logits(TOKENS, x), expected.logits)
    assert (lm.d, lm.dtype, lm.n_ids) == (16, torch.float32, 4096)


@pytest.mark.parametrize("kind", list(MULTIMODAL))
def test_blocks_of_a_multimodal_model_are_those_of_its_text_model(kind, folders):
    lm = TransformersLM(folders(kind), "blocks.1.hook_resid_post", device="cpu")
    assert len(find_blocks(lm.model)) == 2  # the vision tower has 5
    text, head = lm.model.get_decoder(), lm.model.get_output_embeddings()
    expected = text(TOKENS, use_cache=False, output_hidden_states=True).hidden_states[1]
    pre = TransformersLM(folders(kind), "blocks.1.hook_resid_pre", device="cpu").activations(TOKENS)
    torch.testing.assert_close(pre[:, :, 0], expected)
    x = lm.activations(TOKENS)
    torch.testing.assert_close(head(text.norm(x[:, :, 0])), lm.logits(TOKENS))
    torch.testing.assert_close(lm.logits(TOKENS, x), lm.logits(TOKENS))


def test_a_site_of_the_vision_tower_is_refused(folders):
    with pytest.raises(UserError, match=r"never computes \['model\.vision_tower.*choose among model\.language_model"):
        TransformersLM(folders("gemma3"), "model.vision_tower.encoder.layers.0", device="cpu")


def test_weights_in_a_pickle_of_tensors(folders, tmp_path):
    folder = Path(shutil.copytree(folders("llama"), tmp_path / "lm"))
    torch.save(make_model("llama").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    as_bin = TransformersLM(str(folder), "model.layers.0", device="cpu").activations(TOKENS)
    assert torch.equal(as_bin, TransformersLM(folders("llama"), "model.layers.0", device="cpu").activations(TOKENS))


def test_attention_by_another_kernel(folders):
    eager, fused = (
        TransformersLM(folders("llama"), "model.layers.1", device="cpu", load={"attn_implementation": kernel})
        for kernel in ("eager", "sdpa")
    )
    assert (eager.model.config._attn_implementation, fused.model.config._attn_implementation) == ("eager", "sdpa")
    torch.testing.assert_close(eager.activations(TOKENS), fused.activations(TOKENS))


@pytest.mark.parametrize("back_end", [TransformersLM, NnsightLM])
def test_a_module_of_ones_own(back_end):
    if back_end is NnsightLM and find_spec("nnsight") is None:
        pytest.skip("pip install 'sae-lab[nnsight]'")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4096, 16), nn.Linear(16, 16), nn.Linear(16, 4096))
    lm = back_end.from_modules(model, AutoTokenizer.from_pretrained(find_folder(TINY)), "1")
    assert (lm.name, lm.d, lm.context, lm.n_ids, lm.bos_id) == ("Sequential", 16, None, None, 0)
    with torch.no_grad():
        assert torch.equal(lm.activations(TOKENS)[:, :, 0], model[1](model[0](TOKENS)))
        assert torch.equal(lm.logits(TOKENS), model(TOKENS))
        assert torch.equal(lm.logits(TOKENS, torch.zeros(2, 9, 1, 16)), model[2](torch.zeros(2, 9, 16)))
    assert lm.unembedding() is None
    assert not any(p.requires_grad for p in model.parameters())


def test_a_loaded_model_and_a_tokenizer_from_python(folders):
    loaded = TransformersLM(folders("llama"), "blocks.0.hook_resid_post", device="cpu")
    own = TransformersLM.from_modules(loaded.model, loaded.tokenizer, "blocks.0.hook_resid_post", name="mine")
    assert torch.equal(own.activations(TOKENS), loaded.activations(TOKENS))
    assert (own.name, own.context, own.n_ids) == ("mine", 64, 4096)


# Tokenizers beside embeddings


def test_an_embedding_may_be_padded(tmp_path):
    lm = TransformersLM(save_model(tmp_path, "llama", vocab_size=4160), "model.layers.0", device="cpu")
    assert (lm.n_ids, len(lm.tokenizer)) == (4160, 4096)
    assert lm.activations(TOKENS).shape == (2, 9, 1, 16)


def test_a_tokenizer_may_be_larger_until_such_an_id_occurs(tmp_path):
    lm = TransformersLM(save_model(tmp_path, "llama", vocab_size=4000), "model.layers.0", device="cpu")
    lm.activations(TOKENS.clamp(max=3999))
    token = lm.tokenizer.convert_ids_to_tokens(4000)
    with pytest.raises(UserError) as e:
        lm.activations(TOKENS.clamp(max=3999).index_fill(1, torch.tensor([3]), 4000))
    assert f"token id 4000 ({token!r}) is beyond the embedding" in str(e.value)
    assert "give lm.tokenizer=" in str(e.value)


@pytest.mark.parametrize("alone", [True, False])
def test_a_tokenizer_from_elsewhere(alone, folders, tmp_path):
    bare, other = tmp_path / "bare", tmp_path / "tokenizer"
    make_model("llama").save_pretrained(bare)
    with pytest.raises(UserError, match=r"its tokenizer is missing.*lm\.tokenizer="):
        TransformersLM(str(bare), "model.layers.0", device="cpu")
    if alone:
        other.mkdir()
    else:
        shutil.copytree(folders("llama"), other)
    lm = TransformersLM(str(bare), "model.layers.0", device="cpu", tokenizer=str(add_tokenizer(other)))
    assert lm.tokenizer("def f():")["input_ids"] == AutoTokenizer.from_pretrained(other)("def f():")["input_ids"]
    with pytest.raises(UserError, match=r"^tokenizer=.*nothing is not a folder"):
        TransformersLM(str(bare), "model.layers.0", device="cpu", tokenizer=str(tmp_path / "nothing"))


def test_a_tokenizer_without_bos_takes_its_eos(folders, tmp_path):
    folder = Path(shutil.copytree(folders("llama"), tmp_path / "lm"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    eos = settings.get("eos_token")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    lm = TransformersLM(str(folder), "model.layers.0", device="cpu")
    assert lm.tokenizer.bos_token_id is None
    assert lm.bos_id == lm.tokenizer.convert_tokens_to_ids(eos)


def extended(folder: str, to: Path, *words: str) -> str:
    """A copy of a model whose tokenizer has more tokens."""
    shutil.copytree(folder, to)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([*words])
    tokenizer.save_pretrained(to)
    return str(to)


def test_a_pair_may_have_one_vocabulary_inside_the_other(folders, tmp_path):
    chat = extended(folders("llama"), tmp_path / "chat", "<|im_start|>", "<|im_end|>")
    base, tuned = (TransformersLM(f, "model.layers.0", device="cpu") for f in (folders("llama"), chat))
    for pair in (PairedLM(base, tuned, device="cpu"), PairedLM(tuned, base, device="cpu")):
        assert len(pair.tokenizer) == 4096  # both models know all of its tokens
        assert pair.activations(TOKENS).shape == (2, 9, 2, 16)


def test_a_pair_with_permuted_ids_is_refused(folders, tmp_path):
    other = Path(shutil.copytree(folders("llama"), tmp_path / "permuted"))
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    a, b = list(vocabulary)[200:202]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(text))
    pair = [TransformersLM(f, "model.layers.0", device="cpu") for f in (folders("llama"), str(other))]
    with pytest.raises(
        UserError, match=r"different vocabularies \(the token .* has id \d+ in one and \d+ in the other"
    ):
        PairedLM(*pair, device="cpu")


# Adapters


@pytest.fixture(scope="module")
def lora(folders, tmp_path_factory):
    """The folder of an adapter of the Llama, and the model with the adapter beside its weights."""
    peft = pytest.importorskip("peft", reason="pip install 'sae-lab[peft]'")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    base = TransformersLM(folders("llama"), "model.layers.1", device="cpu").model
    base.name_or_path = folders("llama")
    adapted = peft.get_peft_model(base, config).eval()
    folder = tmp_path_factory.mktemp("lora")
    adapted.save_pretrained(folder)
    return folder, adapted


@needs_peft
def test_an_adapter_is_merged(lora, folders):
    folder, adapted = lora
    lm = TransformersLM(str(folder), "blocks.1.hook_resid_post", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(lm.logits(TOKENS), adapted(TOKENS).logits, atol=1e-5, rtol=1e-5)
    plain = TransformersLM(folders("llama"), "model.layers.1", device="cpu")
    assert (plain.logits(TOKENS) - lm.logits(TOKENS)).abs().max() > 1e-3
    assert [name for name, _ in plain.model.named_parameters()] == [name for name, _ in lm.model.named_parameters()]


@needs_peft
def test_the_base_of_an_adapter_may_have_moved(lora, folders, tmp_path):
    folder, _ = lora
    here = Path(shutil.copytree(folder, tmp_path / "adapter"))
    config = json.loads((here / "adapter_config.json").read_text())
    (here / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/was/here"}))
    with pytest.raises(UserError, match=r"^base_model=/was/here is not a folder"):
        TransformersLM(str(here), "model.layers.1", device="cpu")
    lm = TransformersLM(str(here), "model.layers.1", device="cpu", base_model=folders("llama"))
    assert torch.equal(
        lm.activations(TOKENS), TransformersLM(str(folder), "model.layers.1", device="cpu").activations(TOKENS)
    )


@needs_peft
def test_an_adapter_that_does_not_fit_is_refused(lora, folders, tmp_path):
    folder, _ = lora
    deeper = save_model(tmp_path / "deeper", "llama", num_hidden_layers=3)
    with pytest.raises(UserError, match="missing adapter keys") as e:  # PEFT leaves them at zero, with a warning
        TransformersLM(str(folder), "model.layers.1", device="cpu", base_model=deeper)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"^base_model=.* is for adapters"):
        TransformersLM(folders("llama"), "model.layers.1", device="cpu", base_model=folders("llama"))


def test_without_peft_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "tiny", "peft_type": "LORA"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    monkeypatch.setattr("sae_lab.lm.adapters.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"adapter of PEFT, which is missing: pip install 'sae-lab\[peft\]'\.$"):
        TransformersLM(str(tmp_path), "transformer.h.2", device="cpu")


# Quantised weights


def test_a_quantisation_reaches_from_pretrained_as_its_config_object(folders, monkeypatch):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    given = {}

    def record(source, **arguments):
        given.update(arguments)
        raise OSError("recorded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", record)
    load = {
        "quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
        "use_safetensors": True,
    }
    with pytest.raises(UserError, match="recorded"):
        TransformersLM(folders("llama"), "model.layers.0", device="cpu", load=load)
    assert isinstance(given["quantization_config"], BitsAndBytesConfig)
    assert given["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16
    assert (given["use_safetensors"], given["device_map"]) == (True, {"": "cpu"})


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_quantisation_whose_library_is_missing(folders):
    load = {"quantization_config": {"load_in_8bit": True}}
    with pytest.raises(UserError, match="requires bitsandbytes: `pip install") as e:
        TransformersLM(folders("llama"), "model.layers.0", device="cpu", load=load)
    assert "\n" not in str(e.value)


TORCHAO = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}
QUANTISED = {
    "torchao": TORCHAO | {"quant_type": {"default": TORCHAO["quant_type"]["default"] | {"_version": 2}}},
    "bitsandbytes": {"load_in_8bit": True},
    "optimum.quanto": {"quant_method": "quanto", "weights": "int8"},
}


@pytest.mark.parametrize("library", list(QUANTISED))
def test_quantised_weights(library, folders):
    if find_spec(library.partition(".")[0]) is None:
        pytest.skip(f"pip install {library}")
    full = TransformersLM(folders("llama"), "model.layers.1", device="cpu")
    load = {"quantization_config": QUANTISED[library]}
    lm = TransformersLM(folders("llama"), "model.layers.1", device="cpu", load=load)
    x, expected = lm.activations(TOKENS), full.activations(TOKENS)
    assert x.dtype == lm.dtype == torch.float32
    assert 0 < (x - expected).norm() / expected.norm() < 0.1
    assert weights_digest(lm.model) != weights_digest(full.model)
    torch.testing.assert_close(lm.unembedding(), full.unembedding(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ({"trust_remote_code": True}, r"^load\.trust_remote_code has a setting of its own: give trust_remote_code="),
        ({"torch_dtype": "bfloat16"}, r"^load\.torch_dtype has a setting of its own: give dtype="),
        ({"weights_only": False}, r"^load\.weights_only cannot be set"),
        ({"quantization_config": {"bits": 3}}, r"^load\.quantization_config is not understood .*load_in_8bit"),
        ({"quantization_config": 8}, r"^load\.quantization_config must be a dictionary"),
        ({"attn_implementation": "no_such_kernel"}, "no_such_kernel"),
        ({"no_such_argument": 1}, "no_such_argument"),
    ],
)
def test_wrong_loading_options(load, message, folders):
    with pytest.raises(UserError, match=message) as e:
        TransformersLM(folders("llama"), "model.layers.0", device="cpu", load=load)
    assert "\n" not in str(e.value)


# What is not a causal language model


def write_config(folder: Path, **content) -> None:
    (folder / "config.json").write_text(json.dumps(content))


def make_gguf(folder: Path) -> None:
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")


def make_pipeline(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')


def make_sentence_encoder(folder: Path) -> None:
    make_encoder(folder)
    (folder / "config_sentence_transformers.json").write_text("{}")


def make_encoder(folder: Path) -> None:
    """A BERT without a head: `transformers` would add one with random weights."""
    AutoModel.from_config(AutoConfig.for_model("bert", **BERT)).save_pretrained(folder)


def make_masked(folder: Path) -> None:
    AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **BERT)).save_pretrained(folder)


def make_encoder_decoder(folder: Path) -> None:
    config = AutoConfig.for_model("t5", d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8, vocab_size=4096)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)


def make_remote(folder: Path) -> None:
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    write_config(folder, model_type="own", auto_map=code)
    for file in ("configuration_own.py", "modeling_own.py"):
        (folder / file).write_text(f"raise SystemExit('{file} ran')")


def make_dangerous(folder: Path) -> None:
    """A pickle that calls a function when it is loaded."""
    make_model("llama").save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Path}, folder / "pytorch_model.bin")


BERT = {"vocab_size": 4096, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2} | {
    "intermediate_size": 16
}
REFUSED = {
    make_gguf: "GGUF.*give the model that they were converted from",
    make_pipeline: "pipeline of diffusers.*give one with name=",
    make_sentence_encoder: "encoder of sentence-transformers.*with name=",
    make_encoder: r"not a whole BertLMHeadModel: its files lack \d+ weights, such as cls.*give name=",
    make_masked: r"masked language model \(BertForMaskedLM\): give name=",
    make_encoder_decoder: r"encoder-decoder model \(t5\): give name=",
    make_remote: r"comes with code of its own.* give trust_remote_code=true if you trust it",
    make_dangerous: "cannot be loaded as a causal language model",
    lambda folder: write_config(folder, architecture="TopKSAE"): "config.json without a model_type: give name=",
    lambda folder: write_config(folder, model_type="vit"): r"has none of model_type vit\): give name=",
    lambda folder: write_config(folder, model_type="nothing_known"): "nothing_known",
    lambda folder: (folder / "config.json").write_text("{"): "cannot be loaded as a causal language model",
}


@pytest.mark.parametrize("make", list(REFUSED), ids=lambda make: make.__name__)
def test_what_is_not_a_causal_language_model(make, tmp_path):
    make(add_tokenizer(tmp_path))
    with pytest.raises(UserError, match=REFUSED[make]) as e:
        TransformersLM(str(tmp_path), "model.layers.0", device="cpu")
    assert "\n" not in str(e.value)


def test_a_file_instead_of_its_folder(folders):
    with pytest.raises(UserError, match=r"model\.safetensors is a file: give name=<the folder"):
        TransformersLM(f"{folders('llama')}/model.safetensors", "model.layers.0", device="cpu")


def test_code_of_a_model_runs_where_it_is_trusted(folders, tmp_path):
    folder = Path(shutil.copytree(folders("llama"), tmp_path / "remote"))
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "code_of_own.OwnConfig", "AutoModelForCausalLM": "code_of_own.Own"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": code}))
    (folder / "code_of_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    lm = TransformersLM(str(folder), "model.layers.0", device="cpu", trust_remote_code=True)
    assert type(lm.model).__name__ == "Own"
    plain = TransformersLM(folders("llama"), "model.layers.0", device="cpu")
    assert torch.equal(lm.activations(TOKENS), plain.activations(TOKENS))
