"""Train an SAE on activations, look at its latents, steer, and write a loop of your own.

Everything runs on the bundled model and Python's standard library, without network and GPU. N_TOKENS is small, so that
it takes seconds.
"""

# %% A tensor of activations is enough. Six lines, with a run folder that every command reads.
import torch

from sae_lab import BatchTopKSAE, train_sae

x = torch.randn(10_000, 64)
sae = BatchTopKSAE(k=8, d_in=64, n_latents=256)
run = train_sae(sae, x, n_tokens=10_000)
print(run.metrics["fvu"], run.sae)

# %% Activations of a language model, on documents of your own or by name.
import os
from pathlib import Path

from sae_lab import Activations, load_lm

N_TOKENS = 10_000
documents = [file.read_text() for file in sorted(Path(os.__file__).parent.glob("*.py"))[:20]]  # or "openwebtext"
lm = load_lm("tiny", "transformer.h.2")
activations = Activations.from_lm(lm, documents, n_eval_tokens=1024, n_val_tokens=1024)
sae = BatchTopKSAE(k=16, d_in=lm.d, n_latents=512)
run = train_sae(sae, activations, n_tokens=N_TOKENS)
print({name: run.metrics[name] for name in ("fvu", "l0", "loss_recovered")})

# %% Which latents fire on a text? Any axes before the width are kept.
text = "def read(path):\n    with open(path) as file:\n        return file.read()"
tokens = torch.tensor([[lm.bos_id, *lm.tokenizer(text)["input_ids"]]])
code = sae.encode(lm.activations(tokens)[:, :, 0])  # (n, t, f)
for position, latent in enumerate(code[0].argmax(dim=-1).tolist()):
    print(repr(lm.tokenizer.decode(tokens[0, position])), latent, round(code[0, position, latent].item(), 2))

# %% Steer: a latent is set to a strength in every pass of the model inside the block.
latent = int(code[0, -1].argmax())
with lm.spliced(sae, lambda z: z.index_fill(-1, torch.tensor(latent), 8.0), keep_error=True):
    print(lm.generate("def main(", max_new_tokens=12))

# %% A loop of your own: `training_step` keeps the constraints, `calibrate` sets the deployed threshold.
from itertools import islice

from sae_lab import calibrate, evaluate_sae, training_step

mine = BatchTopKSAE(k=8, d_in=64, n_latents=256)
optimizer = torch.optim.Adam(mine.parameters(), lr=1e-3)
batches = iter(Activations.from_tensor(x, block_tokens=8192))
for batch in islice(batches, 10):
    step = training_step(mine, optimizer, batch)
    print(f"loss {step.loss:.3f}", end=" ")
calibrate(mine, batches, n=3)
print(evaluate_sae(mine, x)["fvu"])
