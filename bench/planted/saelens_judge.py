"""Judge the SAE that export.py wrote by SAELens' evaluator, on the same rows: python saelens_judge.py OUT."""

import json
import sys
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.synthetic import FeatureDictionary, eval_sae_on_synthetic_data
from safetensors.torch import load_file

out = Path(sys.argv[1])
tables = load_file(out / "rows.safetensors")
strengths = iter(tables["strengths"].split(1024))


class SameRows:
    """Stands for SAELens' generator: gives the rows of the file, 1024 at a time."""

    def sample(self, n: int) -> torch.Tensor:
        """Return the next n rows' strengths."""
        batch = next(strengths)
        assert len(batch) == n
        return batch


features = FeatureDictionary(*tables["directions"].shape, bias=True, initializer=None)
features.feature_vectors.data, features.bias.data = tables["directions"], tables["offset"]
found = eval_sae_on_synthetic_data(
    SAE.load_from_disk(out / "sae", device="cpu"), features, SameRows(), len(tables["strengths"]), 1024
)
theirs = {**vars(found), **vars(found.classification), "f1": found.classification.f1_score, "l0": found.sae_l0}
ours = json.loads((out / "ours.json").read_text())
ours["explained_variance"] = 1 - ours["fvu"]
judged = ("mcc", "uniqueness", "precision", "recall", "f1", "accuracy", "explained_variance", "shrinkage")
for name in (*judged, "l0", "true_l0"):
    print(f"{name:20s} {ours[name]:.7f} {theirs[name]:.7f} {ours[name] - theirs[name]:+.1e}")
