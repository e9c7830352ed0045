"""Train SAELens' BatchTopK on its own rows of planted=hierarchy: python saelens_train.py OUT [STEPS]."""

import sys

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    train_toy_sae,
)

model = SyntheticModel(
    SyntheticModelConfig(
        num_features=1024,
        hidden_dim=128,
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=HierarchyConfig(
            total_root_nodes=8,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=0,
    )
)
torch.manual_seed(1)
sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=128, d_sae=512, k=7))
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 2000
train_toy_sae(
    sae, model.feature_dict, model.activation_generator, training_samples=512 * steps, batch_size=512, lr=3e-3
)
sae.save_inference_model(sys.argv[1])
