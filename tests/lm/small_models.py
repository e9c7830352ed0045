"""Language models of many kinds with random weights and the bundled tokenizer, small enough to be made in a test."""

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from sae_lab.lm.finding import TINY, find_folder

TEXT = {
    **{"vocab_size": 4096, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8},
    **{"num_key_value_heads": 1, "intermediate_size": 16, "max_position_embeddings": 64},
    **{"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0},
}
VISION = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2},
    **{"image_size": 8, "patch_size": 4, "num_channels": 3},
}
"""More blocks than the text model has, as in Gemma 3's and Qwen2.5-VL's small sizes."""
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_VISION = {"depth": 5, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
MULTIMODAL = {
    "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    "qwen2_5_vl": {"text_config": TEXT | {"rope_parameters": MROPE}, "vision_config": QWEN_VISION},
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral"},
    },
    "idefics3": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION},
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
SMALL_STATE = {"state_size": 4, "attention_hidden_size": 16, "context_length": 64}


def make_model(kind: str, **changes) -> nn.Module:
    """A model of that `model_type`, none of whose weights is trivial, norms included."""
    own = MULTIMODAL.get(kind, TEXT | ({"mixtral": EXPERTS, "mamba": SMALL_STATE, "rwkv": SMALL_STATE}.get(kind, {})))
    config = AutoConfig.for_model(kind, **own | changes)
    causal = type(config) in AutoModelForCausalLM._model_mapping
    model = (AutoModelForCausalLM if causal else AutoModelForImageTextToText).from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1 if p.ndim > 1 else 0.3, generator=generator)
    return model


def add_tokenizer(folder: Path) -> Path:
    """Copy the bundled tokenizer, whose vocabulary has 4,096 tokens, into the folder."""
    for file in find_folder(TINY).glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def save_model(folder: Path, kind: str, **changes) -> str:
    """Write a folder with the model of that kind and the bundled tokenizer."""
    make_model(kind, **changes).save_pretrained(folder)
    return str(add_tokenizer(folder))
