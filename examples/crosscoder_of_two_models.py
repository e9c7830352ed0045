"""A crosscoder of two models: one dictionary for both, which shows to which model each latent belongs.

The second model is the bundled one with changed weights; give two names of the hub instead.
"""

# %% Two models on the same tokens. Sources are the sites of the first, then those of the second.
import os
from copy import deepcopy
from pathlib import Path

import torch

from sae_lab import Activations, BatchTopKSAE, load_lm, pair_lms, train_sae

base = load_lm("tiny", "transformer.h.3")
changed = deepcopy(base.model)
with torch.no_grad():
    changed.transformer.h[3].mlp.c_proj.weight *= 1.2
tuned = load_lm(changed, "transformer.h.3", tokenizer=base.tokenizer, name="tiny, changed")
pair = pair_lms(base, tuned)
print(pair.sites)

# %% A crosscoder is any SAE of several sources: each latent reads and writes both models.
N_TOKENS = 10_000  # small, so that it takes seconds
documents = [file.read_text() for file in sorted(Path(os.__file__).parent.glob("*.py"))[:20]]
activations = Activations.from_lm(pair, documents, n_eval_tokens=1024, n_val_tokens=1024, block_tokens=8192)
crosscoder = BatchTopKSAE(k=16, d_in=pair.d, n_latents=512, n_sources=2, decoder_norm="sum")
run = train_sae(crosscoder, activations, n_tokens=N_TOKENS)
print({name: value for name, value in run.metrics.items() if name.startswith(("fvu", "latents_"))})

# %% Whose is a latent? 0: the first model's, 1: the second's, 1/2: shared.
norms = crosscoder.W_dec.detach().norm(dim=-1)  # (f, 2)
share = norms[:, 1] / norms.sum(dim=1)
print(f"{(share < 0.3).sum()} of the first alone, {(share > 0.7).sum()} of the second, {len(share)} in all")

# %% Codes of both models' activations, stacked along the sources: (b, 2, d) or (n, t, 2, d).
tokens = torch.tensor([[base.bos_id, *base.tokenizer("import os")["input_ids"]]])
x = pair.activations(tokens)
code = crosscoder.encode(x)  # (n, t, f)
print(x.shape, code.shape, crosscoder.decode(code, x).shape)
