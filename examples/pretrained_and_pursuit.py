"""Search for codes in the dictionary of a pretrained SAE, and train another encoder for it.

Here the pretrained SAE is one that is trained first, in seconds. `load_sae("jbloom/GPT2-Small-SAEs-Reformatted", ...)`
reads published ones: docs/interop.md.
"""

# %% A pretrained SAE, and activations of its site.
import os
from pathlib import Path

from sae_lab import Activations, TopKSAE, load_lm, load_sae, train_sae

N_TOKENS = 10_000  # small, so that it takes seconds
documents = [file.read_text() for file in sorted(Path(os.__file__).parent.glob("*.py"))[:20]]
lm = load_lm("tiny", "transformer.h.2")
activations = Activations.from_lm(lm, documents, n_eval_tokens=1024, n_val_tokens=1024, block_tokens=8192)
trained = train_sae(TopKSAE(k=16, d_in=lm.d, n_latents=512), activations, n_tokens=N_TOKENS)
sae = load_sae(trained.folder)
x = next(iter(activations))[:512, 0]  # (b, d)

# %% Its own encoder against searches of as many latents. Lower fvu is better.
from sae_lab import compute_metrics, gradient_pursuit, matching_pursuit, orthogonal_matching_pursuit

codes = {"encoder": sae.encode(x)} | {
    pursuit.__name__: pursuit(x, sae, k=16)
    for pursuit in (matching_pursuit, gradient_pursuit, orthogonal_matching_pursuit)
}
found = {name: compute_metrics(x, code, sae.decode(code, x)) for name, code in codes.items()}
for name, values in found.items():
    print(f"{name:30} l0 {values['l0']:5.1f}  fvu {values['fvu']:.4f}")

# %% An MLP encoder for the same dictionary: it starts as the encoder of the SAE, or from scratch.
from sae_lab import with_encoder

mlp = with_encoder(sae, hidden=[256])
new = with_encoder(sae, hidden=[256, 256], from_scratch=True)
run = train_sae(new, activations, n_tokens=N_TOKENS)
print(run)
