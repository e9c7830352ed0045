"""Parts of SAEs: sources, normalization, layers, MLP encoders, unit norms, resampling. Contains no SAE."""
